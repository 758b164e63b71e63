"""Finds and checks a saved adapter before PEFT or transformers makes layers for it.

PEFT and transformers have four functions that load an adapter, and no hook that runs before layers are made. So all
four are wrapped once, when smoa is imported. A wrapper first finds the adapter in its folder or on the Hub, and checks
its header (`find_adapter`). While the function runs, `incoming()` gives the adapter to injection, which then decomposes
no weight, because the labels come from the file. Adapters of other methods are not affected.
"""

from __future__ import annotations

import inspect
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from peft.auto import _BaseAutoPeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as read_tensors
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, ConfigError
from smoa.files.base import taking_over
from smoa.files.names import PREFIX, places_loaded
from smoa.layers.layer import around_adapters, smoa_layers

HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "repo_type")


FIXED = ("num_blocks", "num_blocks_pattern", "modulation", "bias", "ensure_weight_tying", "trainable_token_indices")
"""Settings by which tensors are read, whatever their ranks."""
MEANING = (*FIXED, "r", "use_rslora", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Settings by which tensors are read."""


class AdapterFile(NamedTuple):
    """The weights of a saved SMoA adapter: the file, if they were read too all tensors on the CPU, and whether PEFT
    skips those of another shape."""

    path: Path
    tensors: dict[str, Tensor] | None
    skips: bool


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise AdapterFileError(f"{path}: is not a regular file; save the adapter again")
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: torch can't map the file
        found = f"is not a whole safetensors file ({error})"
        raise AdapterFileError(f"{path}: {found}; save or fetch it again") from None


def _check_keys(path: Path, keys: Iterable[str]) -> None:
    if not any(key.endswith(".smoa_A.weight") for key in keys):
        raise AdapterFileError(f"{path}: has no smoa_A factor, so it does not belong to {CONFIG_NAME}")


def bytes_of(path: Path) -> bytes:
    """The content of an adapter's weights."""
    with _reading(path):
        return path.read_bytes()


def tensors_of(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in the content of an adapter's weights."""
    with _reading(path):
        tensors = read_tensors(data)
    _check_keys(path, tensors)
    return tensors


def find_weights(source: str | os.PathLike[str], config: object = None, **options: Any) -> Path | None:
    """The file with the weights of the SMoA adapter in a folder or on the Hub.

    Args:
        source: Folder or hub id.
        config: The config to load it with, by default the one in the folder.
        options: PEFT's options for the Hub (`HUB_OPTIONS`), such as `subfolder`, `revision` and `token`.

    Returns:
        None if there is none or it belongs to another method. PEFT then loads it, or reports what is missing.
    """
    saved = saved_config(_located(source, CONFIG_NAME, options))
    ours = saved.get("peft_type") == "SMOA" if config is None else isinstance(config, SmoaConfig)
    if not ours:
        return None
    if saved.get("peft_type") == "SMOA" and "smoa_format" not in saved:
        raise AdapterFileError(
            f"{source}: {CONFIG_NAME} has no smoa_format, as before smoa 0.2; train the adapter again"
        )
    path = _located(source, SAFETENSORS_WEIGHTS_NAME, options)
    if path is None or not path.exists():
        pickle = _located(source, WEIGHTS_NAME, options)
        if pickle is not None and pickle.exists():
            raise AdapterFileError(
                f"{pickle}: is a pickle, which can run code when it is read; "
                f"save the adapter as {SAFETENSORS_WEIGHTS_NAME}"
            )
        return None
    return path


def find_adapter(
    source: str | os.PathLike[str], config: object = None, read: bool = False, skips: bool = False, **options: Any
) -> AdapterFile | None:
    """As `find_weights`, with its header checked or, if asked, the tensors read."""
    path = find_weights(source, config, **options)
    if path is None:
        return None
    if read:
        return AdapterFile(path, tensors_of(path, bytes_of(path)), skips)
    with _reading(path), safe_open(path, "pt") as file:
        _check_keys(path, file.keys())
    return AdapterFile(path, None, skips)


def _located(source: str | os.PathLike[str], name: str, options: dict[str, Any]) -> Path | None:
    """Path of a file in a folder, which may not exist, or downloaded from the Hub; None if the Hub does not have it."""
    if Path(source).exists():
        return Path(source, options.get("subfolder", ""), name)
    try:
        return Path(hf_hub_download(str(source), name, **options))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def saved_config(path: Path | None) -> dict[str, Any]:
    """The content of a config; empty if it can't be read, which its loader then reports."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


def read_adapter(source: str | os.PathLike[str]) -> tuple[Path, bytes]:
    """The weights of the SMoA adapter in a folder or on the Hub, for `tensors_of`."""
    if (path := find_weights(source)) is None:
        raise AdapterFileError(f"{source}: has no {SAFETENSORS_WEIGHTS_NAME} of a SMoA adapter")
    return path, bytes_of(path)


_INCOMING: ContextVar[tuple[Path, Callable[[], AdapterFile | None]] | None] = ContextVar("smoa_incoming", default=None)
"""The folder or hub id that was given, and what finds the adapter there. On the Hub it does so only if injection asks:
an adapter of another method costs no request."""


def incoming() -> AdapterFile | None:
    """The adapter that is being loaded, if any. It has tensors if the loader does not check them: injection does."""
    known = _INCOMING.get()
    return None if known is None else known[1]()


@contextmanager
def door(
    source: str | os.PathLike[str] | None,
    config: object = None,
    read: bool = False,
    tensors: dict[str, Tensor] | None = None,
    **options: Any,
) -> Iterator[AdapterFile | None]:
    """Check a saved adapter, found as by `find_adapter`, and return it from `incoming()` within the block.

    Without a source the adapter is not in files, but perhaps in `tensors`. One on the Hub is found when `incoming()` is
    called first.
    """
    place, known = None if source is None else Path(source, options.get("subfolder", "")), _INCOMING.get()
    if tensors is not None:  # by the names of files, or without what PEFT puts before them
        named = {key if key.startswith(PREFIX) else PREFIX + key: each for key, each in tensors.items()}
        own = AdapterFile(Path("adapter_state_dict", "tensors"), named, bool(options.get("skips")))
        known = own.path, lambda: own
    elif source is None or place is None:
        known = None
    elif known is None or known[0] != place:  # or one loader calls another
        known = place, cache(partial(find_adapter, source, config, read, **options))
    token = _INCOMING.set(known)
    try:
        yield incoming() if source is not None and Path(source).exists() else None
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
    function = owner.__dict__[name]
    original = inspect.unwrap(getattr(function, "__func__", function), stop=lambda f: not hasattr(f, "__smoa_door__"))
    guarded = _guarded(original, source)
    setattr(owner, name, classmethod(guarded) if isinstance(function, classmethod) else guarded)


def _alike(old: SmoaConfig, source: Any, name: Any, options: dict[str, Any]) -> SmoaConfig:
    """The config of a saved adapter that is loaded under a known name, whose own is `old`; ConfigError if the settings
    of that, which PEFT keeps, would give the tensors another meaning."""
    if find_weights(source, None, **options) is None:  # weights may come without a config
        return old
    new = SmoaConfig.from_pretrained(source, **options)
    if said := unlike(new, old, MEANING):
        raise ConfigError(
            f"{source}: has {said} as the loaded {name!r}, whose settings stay; load it under another name, or call "
            f"delete_adapter({name!r}) first and set_adapter({name!r}) then"
        )
    return new


def unlike(new: SmoaConfig, old: SmoaConfig, fields: Iterable[str]) -> str:
    """Which of these settings differ in meaning, in words; empty if none."""
    values = {field: (_meant(new, field), _meant(old, field)) for field in fields}
    return "; ".join(f"{field}={own!r}, not {other!r}" for field, (own, other) in values.items() if own != other)


def _meant(config: SmoaConfig, field: str) -> Any:
    value: Any = config.alpha_of("", config.r) if field == "alpha" else getattr(config, field)
    return sorted({*value}) if field == "modules_to_save" and value else value  # tokens are rows of a tensor, in order


@contextmanager
def untouched(base: nn.Module) -> Iterator[None]:
    """Take out of a model what an adapter that is refused in the context has put into it, and activate again what was
    active: attributes of its modules, and the contents of those that are dictionaries or sets. Subclasses of these may
    refuse to change, as diffusers' configs do, and are left alone."""
    around = [module for _, module in around_adapters(base)]
    stores = [own for layer in around if isinstance(layer, BaseTunerLayer) for own in layer.children()]
    owners = [vars(module) for module in (*around, *stores)]  # without what is in the stores
    tables = [own for owner in owners for own in (owner, *owner.values()) if type(own) in (dict, set, OrderedDict)]
    before = [(table, table.copy()) for table in tables]
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:
        for table, known in before if smoa_layers(base) else []:
            table.clear()
            table.update(known)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise


def _are_of(model: Any, tensors: dict[str, Tensor]) -> bool:
    """Whether all tensors are SMoA's, of layers that the model has by these names."""
    if not isinstance(model, nn.Module) or not all(".smoa_" in key for key in tensors):
        return False
    layers = {key.removeprefix(PREFIX).rpartition(".smoa_")[0] for key in tensors}
    return layers <= {name for name, _ in model.named_modules()}


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
        options = {**given, **given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
        known = getattr(given.get("load_config"), "ignore_mismatched_sizes", False)  # of transformers' from_pretrained
        skips = bool(options.get("ignore_mismatched_sizes", known))
        options = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        # The config that was passed, or that of the loaded adapter which gets the weights
        loaded = {} if isinstance(args[0], type) else getattr(args[0], "peft_config", {})
        config = given.get("config") or given.get("peft_config") or loaded.get(given.get("adapter_name"))
        # `from_pretrained` calls `load_adapter` too, for an adapter that it has made, perhaps by a config it was given
        old = None if _INCOMING.get() is not None else loaded.get(given.get("adapter_name"))
        base = args[0] if isinstance(args[0], nn.Module) else given.get("model")
        tensors = given.get("adapter_state_dict")
        if tensors is not None and not _are_of(base, tensors):
            tensors = None  # transformers may know other names, or what is no adapter's
        with door(place, config, checks_nothing, tensors, skips=skips, **options) as file:
            over: AbstractContextManager[None] = nullcontext()
            if isinstance(old, SmoaConfig) and place is not None and not checks_nothing:
                name = str(given.get("adapter_name"))
                over = taking_over(old, _alike(old, place, name, options), places_loaded(args[0], old, name))
            if checks_nothing and file is not None:
                given["adapter_state_dict"] = file.tensors
            with over, untouched(base) if isinstance(base, nn.Module) else nullcontext():
                return original(*call.args, **call.kwargs)

    load.__smoa_door__ = True  # type: ignore[attr-defined]
    return load
