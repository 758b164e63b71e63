"""Saving an adapter so that whoever looks finds the old one or the new one, whole, whenever the process is killed.

PEFT's `save_pretrained` writes its files one after the other into the folder. Here they are written beside it, and then
the two folders change places. Linux and macOS can do that in one step; elsewhere, and on file systems that cannot, the
old folder steps aside first, and for that moment both lie beside the place under hidden names.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import ConfigError
from smoa.files.adapter_card import adapter_card

MODEL_CARD = "README.md"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, fs.h
RENAME_SWAP = 2  # macOS: stdio.h


def save_adapter(
    model: Any,
    folder: str | Path,
    *,
    base_model_name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    **options: Any,
) -> None:
    """`model.save_pretrained(folder)`, in which a kill or a full disk leaves the old adapter or the new, never half.

    What else lies in the folder stays, but for what somebody writes into it in this moment. Files that the disk has not
    yet seen survive a kill, and a crash of the machine as far as its file system orders them: every file is flushed
    before the folders change places.

    Args:
        model: A `PeftModel`, or a transformers model with an adapter.
        folder: Made if need be.
        base_model_name: Put this name of the base into `adapter_config.json` and the model card instead of the path
            that the base was loaded from: for adapters that leave this machine.
        metrics: Replace PEFT's model card, mostly blanks to fill in, by one that names base, config, these results
            (there may be none: `{}`) and how to load the SMoA adapter; beside the config of each adapter saved.
        options: Passed to `save_pretrained`.

    Raises:
        NotADirectoryError: `folder` is a file.
        ConfigError: a card is asked for, and not all adapters of the model are SMoA's.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: is a file; name a folder for the adapter")
    others = [name for name, config in model.peft_config.items() if not isinstance(config, SmoaConfig)]
    if metrics is not None and others:
        raise ConfigError(f"metrics: {others[0]} is no SMoA adapter; save it without metrics, with PEFT's model card")
    if not options.get("is_main_process", True):  # it takes part in gathering, and writes nothing
        with tempfile.TemporaryDirectory() as nowhere:
            model.save_pretrained(nowhere, **options)
        return
    with replaced_folder(target) as temporary:
        before = _configs(temporary)
        model.save_pretrained(temporary, **options)
        for file, state in _configs(temporary).items():
            if before.get(file) == state:  # of another adapter, which lies in the folder besides
                continue
            if base_model_name is not None:
                _rename_base(file, temporary / MODEL_CARD, base_model_name)
            if metrics is not None:
                _write_card(file.parent, target.resolve().name, metrics)


def _configs(folder: Path) -> dict[Path, tuple[int, int]]:
    """The configs of the adapters in a folder, and what changes when one is written."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.rglob(CONFIG_NAME)}


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a copy of the folder, or an empty one, that takes its place when the block ends well, and else vanishes."""
    target = target.resolve()  # a symlink stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True) as room:
        temporary = Path(room) / target.name
        if target.exists():
            shutil.copytree(target, temporary, symlinks=True)
        else:
            temporary.mkdir()
        yield temporary
        _flush(temporary)
        if target.exists():
            _exchange(temporary, target)
        else:
            temporary.rename(target)


@contextmanager
def new_folder(target: Path, theirs_will_do: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block ends well and vanishes otherwise.

    Args:
        theirs_will_do: If somebody else has made the folder, theirs stays and ours vanishes.

    Raises:
        ConfigError: the folder exists, at the start or meanwhile, and theirs won't do.
    """
    if target.exists() and not theirs_will_do:
        raise ConfigError(f"{target}: exists; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        if not target.exists():
            temporary.chmod(0o755)  # mkdtemp makes it private
            temporary.rename(target)
        elif not theirs_will_do:
            raise ConfigError(f"{target}: somebody else has made it meanwhile; choose another folder")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_base(file: Path, card: Path, name: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    old, config["base_model_name_or_path"] = config.get("base_model_name_or_path"), name
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    if old and card.is_file():
        text = card.read_text(encoding="utf-8")
        for place in sorted({str(old), str(Path(old).expanduser())}, key=len, reverse=True):
            text = text.replace(place, name)
        card.write_text(text, encoding="utf-8")


def _write_card(folder: Path, title: str, metrics: Mapping[str, float]) -> None:
    config = SmoaConfig.from_pretrained(folder)
    # as the file has it: reading puts the home folder in, which tells who the user is
    config.base_model_name_or_path = json.loads((folder / CONFIG_NAME).read_text("utf-8"))["base_model_name_or_path"]
    (folder / MODEL_CARD).write_text(adapter_card(title, config, metrics), encoding="utf-8")


def _exchange(new: Path, old: Path) -> None:
    """Let the two folders change places; the old one is then where the new one was."""
    if _exchange_in_one_step(new, old):
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise


def _exchange_in_one_step(new: Path, old: Path) -> bool:
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None)
    first, second = os.fsencode(new), os.fsencode(old)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(first, second, RENAME_SWAP) == 0)
    return False


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb+" if os.name == "nt" else "rb") as file:  # what is read-only can be flushed too
                os.fsync(file.fileno())
