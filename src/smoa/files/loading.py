"""Checks a saved adapter before PEFT or transformers makes layers for it.

PEFT and transformers have four functions that load an adapter, and no hook that runs before layers are made. So all
four are wrapped once, when smoa is imported. A wrapper first finds and checks the adapter (`find_adapter`). While the
function runs, `incoming()` gives the adapter to injection, which then decomposes no weight, because the labels come
from the file, and allows no larger rank than the file has. Adapters of other methods are not affected.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.auto import _BaseAutoPeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers.integrations.peft import PeftAdapterMixin

from smoa.atomic import recover
from smoa.errors import AdapterFileError, ConfigError
from smoa.files.adapter_folder import HUB_OPTIONS, AdapterFile, find_adapter


@dataclass(frozen=True)
class Incoming:
    """An adapter that is being loaded.

    Args:
        place: The folder or hub id that was given.
        file: Its weights.
        tensors: Their tensors, if the loader does not check them. Injection then checks and loads them.
    """

    place: Path
    file: AdapterFile
    tensors: dict[str, Tensor] | None = None


_INCOMING: ContextVar[Incoming | None] = ContextVar("smoa_incoming", default=None)


def incoming() -> Incoming | None:
    """The adapter that is being loaded, if any."""
    return _INCOMING.get()


@contextmanager
def door(
    source: str | os.PathLike[str] | None, config: object = None, read: bool = False, **options: Any
) -> Iterator[Incoming | None]:
    """Check a saved adapter, and return it from `incoming()` within the block.

    Args:
        source: Folder or hub id; None if the adapter is not in files.
        config: The config to load it with, by default the one in the folder.
        read: Read the tensors too.
        options: PEFT's options, such as `subfolder` and `revision`.

    Raises:
        AdapterFileError: the weights are a pickle, are damaged, or come from another adapter than the config, or
            another adapter was saved into the folder meanwhile.
        ConfigError: the config breaks a rule; the message names the file.
    """
    place = None if source is None else Path(source, options.get("subfolder") or "")
    if source is not None:
        recover(Path(source))  # from a killed save
    known = _INCOMING.get()
    if known is not None and known.place == place:  # one loader calls another
        yield known
        return
    file = None if source is None else find_adapter(source, config, **options)
    found = None if file is None or place is None else Incoming(place, file, file.read() if read else None)
    token = _INCOMING.set(found)
    try:
        yield found
        if file is not None and source is not None and Path(source).exists():
            again = find_adapter(source, config, **options)
            if again is None or again.save_id != file.save_id:
                raise AdapterFileError(f"{place}: another adapter was saved here during the load; load it again")
    except ConfigError as error:
        if place is None or CONFIG_NAME in str(error):
            raise
        raise ConfigError(f"{place / CONFIG_NAME}: {error}") from None
    finally:
        _INCOMING.reset(token)


def guard_loading() -> None:
    """Wrap the functions of PEFT and transformers that load adapters. A second call replaces the wrappers."""
    _replace(_BaseAutoPeftModel, "from_pretrained", "pretrained_model_name_or_path")
    _replace(PeftModel, "from_pretrained", "model_id")
    _replace(PeftModel, "load_adapter", "model_id")
    _replace(PeftAdapterMixin, "load_adapter", "peft_model_id")


def _replace(owner: type, name: str, source: str) -> None:
    found = owner.__dict__[name]
    original = inspect.unwrap(getattr(found, "__func__", found), stop=lambda f: not hasattr(f, "__smoa_door__"))
    guarded = _guarded(original, source)
    setattr(owner, name, classmethod(guarded) if isinstance(found, classmethod) else guarded)


def _guarded(original: Callable[..., Any], source: str) -> Callable[..., Any]:
    signature = inspect.signature(original)
    checks_nothing = "adapter_state_dict" in signature.parameters  # transformers; it accepts tensors

    @wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            call = signature.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # raises it
        given = call.arguments
        place = None if given.get("adapter_state_dict") is not None else given.get(source)
        with door(place, _known_config(args[0], given), checks_nothing, **_hub_options(given)) as found:
            if checks_nothing and found is not None:
                given["adapter_state_dict"] = found.tensors
            return original(*call.args, **call.kwargs)

    load.__smoa_door__ = True  # type: ignore[attr-defined]
    return load


def _known_config(model: Any, given: Mapping[str, Any]) -> object:
    """The config that was passed, or the config of the loaded adapter that gets the weights."""
    passed = given.get("config") or given.get("peft_config")
    there = {} if isinstance(model, type) else getattr(model, "peft_config", {})
    return passed or there.get(given.get("adapter_name"))


def _hub_options(given: Mapping[str, Any]) -> dict[str, Any]:
    options = {**given, **given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
    return {name: options[name] for name in HUB_OPTIONS if name in options}
