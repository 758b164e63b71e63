"""Base model and saved adapter into one model that plain transformers loads, without smoa.

ΔW is relative to W, so in bfloat16 an entry that changes by less than a 512th stays as it was. Merging is done in
float32 (or wider) whatever the base's dtype; what rounding to the saved dtype then takes from ΔW is measured.

Where the base is a folder of safetensors, every tensor is read, merged and written on its own, so memory stays near the
largest tensor's size. Everything else (GGUF, quantized, tied weights of which one changes) goes through a loaded model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.atomic import new_folder
from smoa.config.adapter_config import SmoaConfig
from smoa.export.base_checkpoint import (
    BESIDES,
    LEGAL,
    TOKENIZER,
    BaseCheckpoint,
    adapter_config,
    auto_class,
    base_folder,
)
from smoa.export.in_memory import merge_in_memory, with_plain_weights
from smoa.export.model_card import model_card, what_was_lost
from smoa.export.shards import Checkpoint, has_safetensors
from smoa.export.streaming import RoundingLoss, SavedAdapter, plan_stream, stream_merge

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DEQUANTIZED = "The base is quantized: the adapter is merged into its dequantized weights, which is what it was used on."
NOTEWORTHY = 0.01
"""Share of ΔW lost to rounding from which on the summary points to float32."""


@dataclass(frozen=True)
class Export:
    """What `merge_and_save` did.

    Args:
        folder: Where the merged model lies.
        base: Name of the base model.
        loss: What rounding to the saved dtype (`loss.dtype`) took from ΔW, in all and by layer.
        streamed: Whether the model was never in memory as a whole.
        notes: What a user of the merged model should know, in sentences.
    """

    folder: Path
    base: str
    loss: RoundingLoss
    streamed: bool
    notes: tuple[str, ...]

    def summary(self) -> str:
        """What happened, in sentences."""
        dtype = _name(self.loss.dtype)
        return " ".join(
            [f"{len(self.loss.by_layer)} weights merged in float32, saved in {dtype}: {what_was_lost(self.loss)}"]
            + ([] if self.loss.total < NOTEWORTHY else ['float32 (dtype="float32") loses next to nothing.'])
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
) -> Export:
    """Merge a saved adapter into its base model: `output` gets weights, config, tokenizer and a model card.

    Args:
        adapter: The adapter's folder, of any PEFT method whose layers can merge.
        output: A folder that doesn't exist yet; it appears whole or not at all.
        base: A folder or hub id, by default the adapter's own; or a loaded model, which is used up.
        dtype: Of the saved weights. "auto": as in the base; float32 where the base is quantized.
        max_shard_size: As `save_pretrained` takes it.
        tokenizer: Saved in the place of the adapter's or the base's.
        trust_remote_code: Let the base's repository run its own code.
        notes: Sentences for the model card.

    Raises:
        ConfigError: `output` exists, or `adapter` is none.
        MergeError: the base can't be had, or a merged weight is not finite.
        AdapterFileError: the adapter doesn't fit the base.
    """
    source, target = Path(adapter), Path(output)
    config = adapter_config(source)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    with new_folder(target) as folder, torch.no_grad():
        if isinstance(base, PreTrainedModel):
            name, origin, loss = str(base.name_or_path), None, None
        else:
            name = str(base or config.base_model_name_or_path)
            origin = base_folder(name, config.revision)
            checkpoint = BaseCheckpoint(origin, source, config, trust_remote_code)
            loss = _stream(checkpoint, folder, wanted, max_shard_size)
        streamed = loss is not None
        if loss is None:
            model = base if isinstance(base, PreTrainedModel) else checkpoint.load()
            quantized = getattr(model, "hf_quantizer", None) is not None
            notes += (DEQUANTIZED,) if quantized else ()
            wanted = wanted or (torch.float32 if quantized else model.dtype)
            loss = merge_in_memory(with_plain_weights(model), source, folder, wanted, max_shard_size)
        _copy_besides(source, origin, folder, tokenizer)
        card = model_card(target.name, name, auto_class(config), config, loss, notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Export(target, name, loss, streamed, notes)


def _stream(
    base: BaseCheckpoint, folder: Path, dtype: torch.dtype | None, max_shard_size: int | str
) -> RoundingLoss | None:
    """Merge from disk to disk; None, and nothing written, where that takes a loaded model."""
    config, raw = base.peft_config, base.raw_config()
    if not isinstance(config, SmoaConfig) or config.trainable_token_indices:
        return None
    if not has_safetensors(base.folder) or "quantization_config" in raw:
        return None
    adapter, checkpoint, model = SavedAdapter(base.adapter, config), Checkpoint(base.folder), base.on_meta()
    plan = plan_stream(adapter, model, checkpoint)
    if plan is None:
        return None
    loss = stream_merge(adapter, plan, checkpoint, folder, dtype, max_shard_size)
    # The base's own words are kept: a config written anew may be beyond the reader that the base was made for.
    raw["architectures"] = [type(model).__name__]
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = _name(loss.dtype)
    if model.config.num_labels != base.own_num_labels():
        raw.pop("num_labels", None)
        raw |= {key: model.config.to_dict()[key] for key in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return loss


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy_besides(adapter: Path, base: Path | None, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Tokenizer (the adapter's own before the base's), generation config, code and licence."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif any(adapter.glob("tokenizer*")):
        _copy(adapter, folder, (*TOKENIZER, "chat_template*"))
    elif base is not None:
        _copy(base, folder, TOKENIZER)
    if base is not None:
        _copy(base, folder, (*BESIDES, *LEGAL))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
