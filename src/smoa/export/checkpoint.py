"""The base model of a saved adapter: its folder, config and class, and its files, one tensor at a time.

`safetensors.torch.save_file` takes all tensors of a file at once and copies them. Here only one is in memory, for any
shard size. A file consists of eight bytes with the header's length (little endian), the header (JSON: name → dtype,
shape, offsets), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as TYPES  # PyTorch's dtypes by safetensors' names of them
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from smoa.errors import ConfigError, MergeError, first_of
from smoa.files.card import auto_class
from smoa.files.loading import door
from smoa.files.names import PREFIX, embeddings_of

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
COMPANIONS = ("chat_template*", "generation_config.json", "*processor_config.json", "*.py")
LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
DEQUANTIZED_BY_TRANSFORMERS = ("fp8", "mxfp4", "compressed-tensors")
"""Formats of checkpoints that transformers dequantizes while it loads them, if their config has `dequantize`."""
WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMES = {dtype: name for name, dtype in TYPES.items()}
CHUNK = 1 << 22
"""Number of entries that are cast and written at a time."""


def adapter_config(adapter: Path) -> PeftConfig:
    """The config in an adapter's folder.

    Raises:
        ConfigError: there is none, or it breaks a rule.
        AdapterFileError: the weights are a pickle, are damaged, or come from another adapter than the config.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{adapter}: has no adapter_config.json; give the folder that save_pretrained wrote")
    with door(adapter):
        config: PeftConfig = PeftConfig.from_pretrained(str(adapter))
    return config


def recorded_revision(config: PeftConfig, base: str) -> str | None:
    """The revision in an adapter's config if it is that of `base`: it says nothing of another base model."""
    return config.revision if base == config.base_model_name_or_path else None


def base_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a base model, downloaded if `name` is a hub id.

    Raises:
        MergeError: `name` is not a folder and could not be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        patterns = [*WEIGHTS, *TOKENIZER, *COMPANIONS, *LEGAL]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MergeError(
            f"base model {name!r}: is not a local folder and could not be downloaded from the Hub ({error})"
        ) from error


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Raise MergeError if something of a base model that is read in this context is missing or damaged."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # ValueError: JSON, or the base runs its own code
        raise MergeError(f"{place}: the base model can't be read; is it whole? {error}") from error


@dataclass(frozen=True)
class BaseCheckpoint:
    """A base model in a folder, and the adapter to be merged into it.

    Raises:
        MergeError: a method reads a part of the base that is missing or damaged.
    """

    folder: Path
    adapter: Path
    peft_config: PeftConfig
    trust_remote_code: bool = False

    def model_config(self) -> Any:
        """The model's config, with the number of labels of the adapter's head, if it saves one.

        A head has any name. It is a saved tensor whose shape the model has with another number of labels only.
        """
        config = self.own_config()
        if not getattr(self.peft_config, "modules_to_save", None):
            return config
        saved = load_peft_weights(str(self.adapter), device="cpu")
        for name, own in self._shapes(config).items():
            head = saved.get(PREFIX + name)
            if head is None or head.shape == own or head.dim() != len(own):
                continue
            labels = config.num_labels + len(head) - own[0]
            if labels > 0:
                other = self.own_config(num_labels=labels)
                if self._shapes(other)[name] == head.shape:
                    return other
        return config

    def own_config(self, **options: Any) -> Any:
        """The config of the base itself. If the adapter's head has as many labels, their names are kept."""
        with readable(self.folder):
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code, **options)
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, dict) and quantization.get("quant_method") in DEQUANTIZED_BY_TRANSFORMERS:
            quantization["dequantize"] = True
        return config

    def raw_config(self) -> dict[str, Any]:
        """`config.json` as it is."""
        with readable(self.folder):
            raw: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return raw

    def on_meta(self, config: Any = None) -> PreTrainedModel:
        """The model without weights, for its modules and the shapes of its parameters; by default of `model_config`."""
        config, chosen = self.model_config() if config is None else config, self._model_class()
        with torch.device("meta"):
            if hasattr(chosen, "from_config"):
                model: PreTrainedModel = chosen.from_config(config, trust_remote_code=self.trust_remote_code)
            else:
                model = chosen(config)
        model.tie_weights()  # transformers 5.0 leaves it to the load of weights
        return model

    def _shapes(self, config: Any) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.on_meta(config).state_dict().items()}

    def load(self) -> PreTrainedModel:
        """The model in memory, in its own dtype, with as many tokens as the adapter's embeddings have, if any."""
        config = self.model_config()
        of_adapter = config.num_labels != self.own_config().num_labels  # the head is
        chosen = self._model_class()
        with readable(self.folder):
            model: PreTrainedModel = chosen.from_pretrained(
                self.folder,
                config=config,
                trust_remote_code=self.trust_remote_code,
                dtype="auto",
                ignore_mismatched_sizes=of_adapter,
            )
        resize_as_saved(model, self.adapter)
        return model

    def _model_class(self) -> Any:
        module = _noted_class(self.peft_config).get("parent_library", transformers.__name__)
        name = class_name(self.peft_config)
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise MergeError(
                f"{self.adapter}: is for a {name}, which transformers {transformers.__version__} lacks in {module}; "
                "install the release that it was trained with"
            ) from error


def resize_as_saved(model: PreTrainedModel, adapter: Path) -> None:
    """Give the model as many tokens as the embeddings that an adapter saves have, if it saves any."""
    saved = load_peft_weights(str(adapter), device="cpu")
    for name, module in embeddings_of(model).items():
        own = saved.get(f"{PREFIX}{name}.weight")
        if own is not None and len(own) != len(module.weight):
            model.resize_token_embeddings(len(own), mean_resizing=False)
            break  # it resizes both


def class_name(config: PeftConfig) -> str:
    """Name of transformers' class for the adapter's task or, without one, of the class that PEFT noted."""
    return _noted_class(config).get("base_model_class") or auto_class(config)[0]


def _noted_class(config: PeftConfig) -> dict[str, str]:
    """What PEFT notes of a model of transformers if its adapter has no task: `base_model_class`, `parent_library`."""
    noted: dict[str, str] = config.auto_mapping or {}
    of_transformers = noted.get("parent_library", "").startswith("transformers.")
    return noted if config.task_type is None and of_transformers else {}


class Shards:
    """The safetensors files of a folder: `entries` are their tensors without data, `read` loads one with its data.

    Raises:
        MergeError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Tensor] = {}
        with readable(folder):
            if (folder / INDEX).is_file():
                self.files: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            else:
                with safe_open(folder / SINGLE, "pt") as opened:
                    self.files = dict.fromkeys(opened.keys(), SINGLE)
        missing = sorted({file for file in self.files.values() if not (folder / file).is_file()})
        if missing:
            raise MergeError(
                f"{folder / INDEX}: names {first_of(missing)}, which is missing; download the checkpoint again"
            )
        for file in sorted(set(self.files.values())):
            with readable(folder / file), safe_open(folder / file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (safe_open is not a dict)
                    part = opened.get_slice(key)
                    self.entries[key] = torch.empty(part.get_shape(), dtype=TYPES[part.get_dtype()], device="meta")

    def read(self, key: str) -> Tensor:
        """One tensor. The file is opened for it only, so that its mapped memory is freed with the tensor."""
        with safe_open(self.folder / self.files[key], "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor


def write_checkpoint(
    folder: Path, entries: dict[str, Tensor], read: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    """Write `model.safetensors`, or shards and their index, into an existing folder.

    `read` is called once for each tensor, in turn. A tensor of another dtype than its entry is cast.
    """
    plan: Any = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, keys in plan.filename_to_tensors.items():
        _write_file(folder / file, {key: entries[key] for key in keys}, read)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, entries: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write one file, wide dtypes first, so that every tensor is aligned."""
    order = sorted(entries, key=lambda key: -entries[key].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in order:
        entry = entries[key]
        span = [offset, offset + entry.nbytes]
        header[key] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            for chunk in read(key).detach().reshape(-1).split(CHUNK):
                file.write(chunk.to(entries[key].dtype).contiguous().view(torch.uint8).numpy().data)
