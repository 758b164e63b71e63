"""Merges a saved adapter into its base, as a model that transformers loads without smoa.

ΔW is relative to W, so bfloat16 drops changes of an entry by less than a 512th. Weights are therefore merged in float32
or wider, and the share of ΔW that rounding to the saved dtype loses is measured.

If the base is a folder of safetensors, tensors are read, merged and written one at a time, so little more memory than
for the largest is needed. Other bases (GGUF, quantized, or with tied weights of which one changes) are loaded whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.atomic import new_folder
from smoa.config import SmoaConfig
from smoa.errors import ConfigError, MergeError
from smoa.export.checkpoint import (
    COMPANIONS,
    INDEX,
    LEGAL,
    SINGLE,
    TOKENIZER,
    BaseCheckpoint,
    Shards,
    adapter_config,
    base_folder,
    class_name,
    recorded_revision,
)
from smoa.export.streaming import RoundingLoss, SavedAdapter, plan_stream, stream_merge
from smoa.files.card import NamedBase, card_text, method_name, named_base

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DEQUANTIZED = "The base is quantized. The adapter is merged into its dequantized weights, on which it was used."
NOTEWORTHY = 0.01
"""Share of ΔW lost to rounding from which on the summary recommends float32."""


@dataclass(frozen=True)
class Export:
    """What `merge_and_save` did.

    Args:
        folder: Folder of the merged model.
        base: Name of the base model.
        loss: How much of ΔW rounding to the saved dtype (`loss.dtype`) lost, in total and by layer.
        streamed: Whether tensors were merged one at a time.
        notes: Sentences for the users of the merged model.
    """

    folder: Path
    base: str
    loss: RoundingLoss
    streamed: bool
    notes: tuple[str, ...]

    def summary(self) -> str:
        """The result in sentences."""
        dtype = _name(self.loss.dtype)
        return " ".join(
            [f"{len(self.loss.by_layer)} weights merged in float32, saved in {dtype}: {self.loss.in_words()}"]
            + ([] if self.loss.total < NOTEWORTHY else ['float32 (dtype="float32") loses almost nothing.'])
            + list(self.notes)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": str(self.folder),
            "base": self.base,
            "dtype": _name(self.loss.dtype),
            "layers": len(self.loss.by_layer),
            "update_lost": self.loss.total,
            "update_lost_by_layer": self.loss.by_layer,
            "streamed": self.streamed,
            "notes": list(self.notes),
        }


def merge_and_save(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | PreTrainedModel | None = None,
    dtype: Dtype = "auto",
    max_shard_size: int | str = "5GB",
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    notes: tuple[str, ...] = (),
    base_name: NamedBase | None = None,
) -> Export:
    """Merge a saved adapter into its base model, and save weights, config, tokenizer and a model card in `output`.

    Args:
        adapter: Folder of the adapter, of any PEFT method that can merge.
        output: A folder that does not exist yet. It is created when it is complete.
        base: Base model to use instead of the one recorded in the adapter, whose revision then does not matter: a
            folder, a Hub id, or a loaded model, which is changed.
        dtype: Dtype of the saved weights. "auto" keeps the base's, or uses float32 if the base is quantized.
        max_shard_size: Largest file, in bytes or as text ("5GB").
        tokenizer: Tokenizer to save instead of the adapter's or the base's.
        trust_remote_code: Allow the base's repository to run its own code.
        notes: Sentences for the model card.
        base_name: How the model card names the base, if not by the place it was loaded from.

    Raises:
        ConfigError: `output` exists, `adapter` is not an adapter, `dtype` is none of these, or `max_shard_size` is no
            size.
        MergeError: the base can't be loaded, or a merged weight is not finite.
        AdapterFileError: the adapter doesn't fit the base.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(map(repr, get_args(Dtype)))}")
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"max_shard_size={max_shard_size!r} is no size, such as 2GB: {error}") from error
    source, target = Path(adapter), Path(output)
    config = adapter_config(source)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    with new_folder(target) as folder, torch.no_grad():
        if isinstance(base, PreTrainedModel):
            name, origin, loss = str(base.name_or_path), None, None
        else:
            name = str(base or config.base_model_name_or_path or "")
            if not name:
                raise MergeError(f"{source}: doesn't say which base model it is for; give it as base")
            origin = base_folder(name, recorded_revision(config, name))
            checkpoint = BaseCheckpoint(origin, source, config, trust_remote_code)
            loss = _stream(checkpoint, folder, wanted, max_shard_size)
        streamed = loss is not None
        if loss is None:
            model = base if isinstance(base, PreTrainedModel) else checkpoint.load()
            quantized = getattr(model, "hf_quantizer", None) is not None
            notes += (DEQUANTIZED,) if quantized else ()
            wanted = wanted or (torch.float32 if quantized else model.dtype)
            loss = merge_in_memory(with_plain_weights(model), source, folder, wanted, max_shard_size)
        _copy_other_files(source, origin, folder, tokenizer)
        card = model_card(target.name, base_name or named_base(name), folder, config, loss, notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Export(target, name, loss, streamed, notes)


def _stream(
    base: BaseCheckpoint, folder: Path, dtype: torch.dtype | None, max_shard_size: int | str
) -> RoundingLoss | None:
    """Merge from disk to disk. If that is not possible, write nothing and return None."""
    config, raw = base.peft_config, base.raw_config()
    if not isinstance(config, SmoaConfig) or config.trainable_token_indices or "quantization_config" in raw:
        return None
    if not any((base.folder / name).is_file() for name in (INDEX, SINGLE)):
        return None
    adapter, checkpoint, model = SavedAdapter(base.adapter, config), Shards(base.folder), base.on_meta()
    plan = plan_stream(adapter, model, checkpoint)
    if plan is None:
        return None
    loss = stream_merge(adapter, plan, checkpoint, folder, dtype, max_shard_size)
    # Edit the base's file, because the transformers release that the base is for may not read a config written by ours.
    raw["architectures"] = [type(model).__name__]
    if named_base(raw.get("_name_or_path")).hub_id is None:  # releases before 5 note there where a model came from
        raw.pop("_name_or_path", None)
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = _name(loss.dtype)
    if model.config.num_labels != base.own_config().num_labels:
        raw.pop("num_labels", None)
        raw |= {key: model.config.to_dict()[key] for key in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return loss


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_plain_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with plain float32 weights, dequantized if it was quantized.

    Raises:
        MergeError: transformers can't dequantize the model's format.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        try:
            model = model.dequantize(dtype=torch.float32)
        except NotImplementedError as error:
            raise MergeError(f"the base can't be dequantized ({error}); give a base that isn't quantized") from error
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    wide: PreTrainedModel = model.float()
    return wide


def merge_in_memory(
    model: PreTrainedModel,
    adapter: Path,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int | str,
) -> RoundingLoss:
    """Merge the adapter of any PEFT method into `model`, in float32, which is changed, and save it in `dtype`.

    Raises:
        MergeError: a merged weight is NaN or infinite, the method can't merge, or the adapter doesn't fit the base.
    """
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    except RuntimeError as error:  # PyTorch's, for tensors of other shapes
        raise MergeError(
            f"{adapter}: can't be loaded into {type(model).__name__} ({error}); give the base model it was trained on"
        ) from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise MergeError(f"{adapter}: PEFT can't merge {kind}, which is more than a change of weights; load it instead")
    adapted.eval()
    loss = RoundingLoss()
    with warnings.catch_warnings():
        # Merge layer by layer, so that only one weight at a time is kept for comparison.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied after merging")
        for name, layer in layers_to_merge(adapted):
            untie(model, layer)
            before = _weight(layer).detach().clone()
            try:
                layer.merge(safe_merge=True)
            except (ValueError, NotImplementedError) as error:
                raise MergeError(f"{name}: {error}") from error
            layer.merge = lambda *_, **__: None  # OSF's would add its change again in merge_and_unload
            loss.add(name, before, _weight(layer).detach(), dtype)
        merged = adapted.merge_and_unload()
    merged.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return loss


def layers_to_merge(adapted: PeftModel) -> list[tuple[str, Any]]:
    """The layers to merge by name; of those that share weight and adapter, the first."""
    tuner: Any = adapted.base_model
    layers: dict[int, tuple[str, Any]] = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, tuner.tuner_layer_cls) and isinstance(_weight(module), Tensor):
            layers.setdefault(id(_weight(module)) if getattr(module, "tied", False) else id(module), (name, module))
    return list(layers.values())


def _weight(layer: Any) -> Any:
    """A layer's weight, or the parameter that it wraps."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)


def untie(model: Any, layer: Any) -> None:
    """Give the layer a weight of its own if another module shares it, because the adapter changes only this layer."""
    base: nn.Module = layer.get_base_layer()
    if getattr(layer, "tied", False) or _weight(layer) is not getattr(base, "weight", None):
        return
    users = [module for module in model.modules() if getattr(module, "weight", None) is base.weight]
    if len({id(module) for module in users} - {id(layer)}) > 1:
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        model.config.tie_word_embeddings = False


def _copy_other_files(
    adapter: Path, base: Path | None, folder: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Save or copy the tokenizer (the adapter's, else the base's), and copy generation config, code and license."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif any(adapter.glob("tokenizer*")):
        _copy(adapter, folder, (*TOKENIZER, "chat_template*"))
    elif base is not None:
        _copy(base, folder, TOKENIZER)
    if base is not None:
        _copy(base, folder, (*COMPANIONS, *LEGAL))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def model_card(
    title: str, base: NamedBase, folder: Path, config: PeftConfig, loss: RoundingLoss, notes: tuple[str, ...]
) -> str:
    """The card as Markdown, with the front matter that model hubs read, and code that loads what `folder` has."""
    loads = {"model": class_name(config)}
    if any(folder.glob("*processor_config.json")):
        loads["processor"] = "AutoProcessor"
    elif any(folder.glob("tokenizer*")):
        loads["tokenizer"] = "AutoTokenizer"
    lines = (f'{name} = {auto}.from_pretrained("PATH")' for name, auto in loads.items())
    loading = "\n".join([f"from transformers import {', '.join(loads.values())}", "", *lines])
    intro = (
        f"`{base.text}` with the {method_name(config)} adapter below merged into {len(loss.by_layer)} of its weights "
        "by smoa.\nIt is a plain transformers model: nothing else is needed to load it."
    )
    paragraphs = "".join(f"\n{note}\n" for note in notes)
    precision = f"## Precision\n\nMerged in float32, saved in {_name(loss.dtype)}: {loss.in_words()}\n{paragraphs}\n"
    front_matter = {"library_name": "transformers", "tags": ["smoa", "merged"]}
    return card_text(title, base, config, front_matter, intro, loading, precision)
