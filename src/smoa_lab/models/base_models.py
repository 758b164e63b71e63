"""Loads base models: a Hub id, a local folder, a GGUF file, or a model of the package index.

A packaged model (``gemma3-270m``, ``smollm2-135m``) is a GGUF file in a Python package. It is dequantized to float32
safetensors once (about a minute); later loads take under a second.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import quantization_config

from smoa.atomic import check_place, new_folder
from smoa.errors import DataError
from smoa_lab.basics.cache import content_of
from smoa_lab.basics.extras import require
from smoa_lab.basics.plain import without_secrets
from smoa_lab.config.run import ModelSection, RunConfig, adapter_rate
from smoa_lab.models.needs import model_needs
from smoa_lab.models.packaged_models import PACKAGED_MODELS, unpacked_folder

logger = logging.getLogger(__name__)

PLACES = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Options about where a model comes from, which hold for its tokenizer too."""
DECIDING = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")
"""Endings of the files of a model's folder that decide what it computes."""


def load_base_model(wanted: ModelSection) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and its tokenizer.

    Raises:
        DataError: the model cannot be loaded, or an option is unknown.
    """
    require(model_needs(wanted))
    source, gguf_file = locate(wanted.name)
    options: dict[str, Any] = {"dtype": getattr(torch, wanted.dtype), **wanted.options}
    if gguf_file:
        options |= _dequantize(gguf_file)
    with _explained(wanted), _bars_on_terminals_only():
        model = AutoModelForCausalLM.from_pretrained(source, **_shared(wanted, gguf_file), **options)
    tokenizer = load_tokenizer(wanted)
    if gguf_file:
        _unmark_gguf(model)
        model.name_or_path = wanted.name  # from_pretrained records the folder, not the file
    return model, tokenizer


def empty_model(wanted: ModelSection, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model with its config and layers, and without weights.

    Raises:
        DataError: there is no such model.
    """
    config = _base_config(wanted)
    with _explained(wanted), torch.device("meta"):
        return cast(PreTrainedModel, auto_class.from_config(config, trust_remote_code=wanted.trust_remote_code))


def with_rate(config: RunConfig) -> RunConfig:
    """The run with the learning rate of its model's size, if it trains an adapter and names none.

    Raises:
        DataError: there is no such model.
    """
    if config.method == "full" or "learning_rate" in config.training:
        return config
    require(model_needs(config.model))
    rate = adapter_rate(sum(parameter.numel() for parameter in empty_model(config.model).parameters()))
    return config.model_copy(update={"training": {**config.training, "learning_rate": rate}})


def base_content(wanted: ModelSection) -> str:
    """What changes when the model does: the hash of its files or, on the Hub, the commit."""
    source, gguf_file = locate(wanted.name)
    folder = Path(source)
    if not folder.is_dir():
        return str(_base_config(wanted)._commit_hash)
    files = [folder / gguf_file] if gguf_file else sorted(filter(_decides, folder.iterdir()))
    return sha256(" ".join(f"{file.name} {content_of(file)}" for file in files).encode()).hexdigest()


def _decides(file: Path) -> bool:
    return file.suffix in DECIDING and file.is_file()


def _base_config(wanted: ModelSection) -> Any:
    """The config as the model is loaded with it: plain options may change its values."""
    source, gguf_file = locate(wanted.name)
    options = {key: value for key, value in wanted.options.items() if isinstance(value, str | int | float)}
    with _explained(wanted):
        return AutoConfig.from_pretrained(source, **_shared(wanted, gguf_file), **options)


def load_tokenizer(wanted: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as :func:`load_base_model` returns it.

    Raises:
        DataError: it cannot be loaded.
    """
    require(model_needs(wanted))
    source, gguf_file = locate(wanted.name)
    with _explained(wanted):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **_shared(wanted, gguf_file), **places(wanted.options))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def places(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's options that say where it comes from, which hold for its tokenizer too."""
    return {key: options[key] for key in PLACES if key in options}


def _shared(wanted: ModelSection, gguf_file: str | None) -> dict[str, Any]:
    """Arguments for the model and its tokenizer."""
    return {"trust_remote_code": wanted.trust_remote_code} | ({"gguf_file": gguf_file} if gguf_file else {})


@contextmanager
def _explained(wanted: ModelSection) -> Iterator[None]:
    try:
        yield
    except TypeError as error:  # transformers passes on unknown options
        raise DataError(
            f"model.options: cannot load {wanted.name!r} with {without_secrets(wanted.options)}: {error}"
        ) from error
    except SafetensorError as error:
        raise DataError(
            f"model.name: cannot load {wanted.name!r}: its weights are cut off or damaged ({error}); fetch it again"
        ) from error
    except (OSError, ValueError, KeyError, struct.error) as error:  # the last for a GGUF file that ends too early
        raise DataError(
            f"model.name: cannot load {wanted.name!r}: {error}. "
            f"Give a Hub id, a folder with config.json and weights, a .gguf file, or one of {sorted(PACKAGED_MODELS)}"
        ) from error


def locate(name: str) -> tuple[str, str | None]:
    """The ``from_pretrained`` source, and the GGUF file in it if that is what was named.

    Raises:
        DataError: there is no such GGUF file.
    """
    if name in PACKAGED_MODELS:
        return str(prepare_packaged_model(name)), None
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise DataError(f"model.name: {name!r}: no such file")
        return str(path.parent), path.name
    return (str(path) if path.is_dir() else name), None


def prepare_packaged_model(name: str) -> Path:
    """The folder with a packaged model as float32 safetensors, made on first use in the cache folder."""
    folder = unpacked_folder(name)
    if folder.is_dir():
        return folder
    require(model_needs(ModelSection(name=name)))
    check_place(folder / "config.json")
    packaged = PACKAGED_MODELS[name]
    logger.info("Dequantizing %s into %s (once, about a minute)", packaged.hub_id, folder)
    with new_folder(folder, keep_existing=True) as temporary:
        gguf = packaged.write(temporary)
        model, tokenizer = load_base_model(ModelSection(name=str(gguf), dtype="float32"))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        gguf.unlink()
    return folder


def _dequantize(gguf_file: str) -> dict[str, Any]:
    """Newer releases of transformers keep GGUF weights quantized by default, older ones always dequantize them."""
    if not hasattr(quantization_config, "GgufConfig"):
        return {}
    return {"quantization_config": quantization_config.GgufConfig(gguf_file=gguf_file, dequantize=True)}


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """transformers' bar for GGUF files does not obey its ``disable_progress_bar``, and fills logs with half lines."""
    reader: Any = modeling_gguf_pytorch_utils
    shown, reader.tqdm = reader.tqdm, partial(tqdm, disable=None)
    try:
        yield
    finally:
        reader.tqdm = shown


def _unmark_gguf(model: PreTrainedModel) -> None:
    """Remove the marks of a quantized model, which would mislead saving and adapters: the weights are plain floats."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
