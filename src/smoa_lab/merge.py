"""Merges an adapter, or a run's, into its base model: the result is a model that transformers loads without smoa.

ΔW is relative to W, so bfloat16 drops changes of an entry by less than a 512th. Each weight is therefore merged in
float32, and the share of ΔW that rounding to the saved dtype loses is measured.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa import MergeError
from smoa_lab import base_models
from smoa_lab.base_models import RunModel
from smoa_lab.basics.folders import check_place, new_folder
from smoa_lab.open_run import open_place, with_saved_adapter
from smoa_lab.pages.card import card_text, method_name

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
DEQUANTIZED_BY_TRANSFORMERS = ("fp8", "mxfp4", "compressed-tensors")
"""Formats of checkpoints that transformers dequantizes while it loads them, if their config has `dequantize`."""
TOKENIZER = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges.txt",
        "*.model",
        "chat_template*",
    ),
)
"""The files of a tokenizer that was saved with an adapter."""
DEQUANTIZED = "The base is quantized. The adapter is merged into its dequantized weights, on which it was used."
NOTEWORTHY = 0.01
"""Share of ΔW lost to rounding from which on the summary recommends float32."""
LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""


@dataclass
class Merged:
    """What a merge did: ``by_layer`` is ‖error of ΔW‖ / ‖ΔW‖ after rounding to the dtype; over all layers ``update``
    and ``error`` are ‖ΔW‖² and ‖error of ΔW‖². ``note`` is for the users of the merged model."""

    folder: Path
    base: str
    dtype: torch.dtype = torch.float32
    note: str = ""
    by_layer: dict[str, float] = field(default_factory=dict)
    update: float = 0.0
    error: float = 0.0

    @property
    def lost(self) -> float:
        """‖error of ΔW‖ / ‖ΔW‖ over all layers, 0 if nothing changes."""
        return (self.error / self.update) ** 0.5 if self.update else 0.0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Add one layer, given its weight before and after the merge, in float32."""
        rounded = after.to(self.dtype)
        if not torch.isfinite(rounded).all():
            rule = "a broken adapter, or a range too small; --dtype float32 has the largest"
            raise MergeError(f"{name}: the merged weight in {self.dtype_name} is NaN or infinite: {rule}")
        update, error = (float(torch.linalg.vector_norm(part)) ** 2 for part in (after - before, rounded - after))
        self.by_layer[name] = (error / update) ** 0.5 if update else 0.0
        self.update += update
        self.error += error

    def in_words(self) -> str:
        """One sentence on how much rounding changed the update, over all layers and in the worst one."""
        if self.lost == 0:
            return "rounding took nothing from the adapter's update."
        worst = max(self.by_layer, key=self.by_layer.__getitem__)
        return (
            f"rounding took {100 * self.lost:.2g} % of the adapter's update "
            f"(‖error‖ / ‖ΔW‖; the most in {worst}: {100 * self.by_layer[worst]:.2g} %)."
        )

    def summary(self) -> str:
        said = f"{len(self.by_layer)} weights merged in float32, saved in {self.dtype_name}: {self.in_words()}"
        advice = ["--dtype float32 loses almost nothing."] if self.lost >= NOTEWORTHY else []
        return " ".join([said, *advice, *filter(None, [self.note])])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": str(self.folder),
            "base": self.base,
            "dtype": self.dtype_name,
            "layers": len(self.by_layer),
            "update_lost": self.lost,
            "update_lost_by_layer": self.by_layer,
            "note": self.note,
        }


def merge_run(place: str | Path, output: Path, dtype: Dtype = "auto", base: str | None = None) -> Merged:
    """Merge an adapter (its folder, or a run's, of any PEFT method that can merge) and save the whole language model:
    weights, config, tokenizer, generation config, licence files and a model card. It needs the base's size in memory.

    ``output`` is a new folder, which is there when it is complete. "auto" keeps the base's dtype, or uses float32 for a
    base that is quantized or a GGUF file.
    """
    check_place(output, is_new=True)
    opened = open_place(place, base)
    adapter, model = opened.adapter, opened.model
    config = PeftConfig.from_pretrained(str(adapter))
    if (task := config.task_type) not in (None, "CAUSAL_LM"):
        rule = "and smoa merge is for language models; load it with PEFT, and call merge_and_unload()"
        raise MergeError(f"{adapter}: is for {getattr(task, 'value', task)}, {rule}")
    of_file = model.section.name.endswith(".gguf") or base_models.packaged_name(model.section.name)
    with new_folder(output) as folder, torch.no_grad():
        loaded, note = plain_base(model, "float32" if dtype == "auto" and of_file else dtype)
        result = Merged(output, model.section.name, loaded.dtype, note)
        merged = model.stopping(merge_in_memory(loaded, adapter, result))
        merged.save_pretrained(folder)
        if any(adapter.glob("tokenizer*")):  # copied and not loaded: it may name code of its own
            for file in {file for pattern in TOKENIZER for file in adapter.glob(pattern) if file.is_file()}:
                shutil.copyfile(file, folder / file.name)
        else:
            model.tokenizer.save_pretrained(folder)
        source = Path(base_models.locate(model.section.name)[0])
        for file in [] if of_file else [file for pattern in LEGAL for file in source.glob(pattern)]:
            shutil.copyfile(file, folder / file.name)
        (folder / "README.md").write_text(model_card(config, result), encoding="utf-8")
    return result


def plain_base(model: RunModel, dtype: Dtype = "float32") -> tuple[PreTrainedModel, str]:
    """The base with plain weights of a dtype, dequantized if it is quantized, and what to say of that. "auto" is its
    own, and float32 for a quantized one."""
    options: dict[str, Any] = dict(model.section.options)
    own = base_models.base_config(model.section)
    format_of_base = getattr(own, "quantization_config", None)
    if isinstance(format_of_base, dict) and format_of_base.get("quant_method") in DEQUANTIZED_BY_TRANSFORMERS:
        format_of_base["dequantize"] = True
        options["config"] = own
    # a run that quantizes computes in its own dtype, a quantized checkpoint in what it names
    loaded_in = None if "quantization_config" in options else "auto" if format_of_base else dtype
    loaded, _ = base_models.load_weights(model.section.model_copy(update={"options": options}), dtype=loaded_in)
    is_quantized = getattr(loaded, "hf_quantizer", None) is not None
    wanted = (torch.float32 if is_quantized else loaded.dtype) if dtype == "auto" else getattr(torch, dtype)
    if is_quantized:
        loaded = loaded.dequantize(dtype=wanted)
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
    plain: PreTrainedModel = loaded.to(wanted)  # type: ignore[arg-type]
    return plain, DEQUANTIZED if is_quantized or format_of_base else ""


def merge_in_memory(model: PreTrainedModel, adapter: Path, result: Merged) -> PreTrainedModel:
    """Merge the adapter of any PEFT method into `model`, which is changed, one weight at a time in float32."""
    adapted = with_saved_adapter(model, adapter).eval()
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = method_name(adapted.active_peft_config)
        raise MergeError(f"{adapter}: PEFT can't merge {kind}, which is more than a change of weights; load it instead")
    layers = {
        name: module
        for name, module in adapted.base_model.model.named_modules()
        if isinstance(module, adapted.base_model.tuner_layer_cls) and isinstance(weight_of(module), Tensor)
    }
    for name, layer in layers.items():
        untie(model, layer)
        layer.merge = partial(_merge_layer, name, layer, layer.merge, result)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied|the merged end has a weight")
        merged: PreTrainedModel = adapted.merge_and_unload().to(result.dtype)
    return merged


def _merge_layer(name: str, layer: Any, merge: Any, result: Merged, *arguments: Any, **options: Any) -> None:
    """Merge a layer in float32, add to the result what rounding loses, and round."""
    weight_of(layer).data = weight_of(layer).data.float()
    before = weight_of(layer).detach().clone()
    merge(*arguments, **options)
    result.add(name, before, weight_of(layer).detach())
    weight_of(layer).data = weight_of(layer).data.to(result.dtype)
    del layer.merge  # a cycle, which would keep the layer and what it needs to unmerge


def weight_of(layer: Any) -> Any:
    """A layer's weight, or the parameter that it wraps."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)


def untie(model: Any, layer: Any) -> None:
    """Give the layer a weight of its own if another module shares it, because the adapter changes only this layer: on
    tied ends PEFT would change both."""
    base: nn.Module = layer.get_base_layer()
    if weight_of(layer) is not getattr(base, "weight", None):
        return
    users = [module for module in model.modules() if getattr(module, "weight", None) is base.weight]
    if len({id(module) for module in users} - {id(layer)}) > 1:
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        model.config.tie_word_embeddings = False


def model_card(config: PeftConfig, result: Merged) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    base = base_models.described_base(result.base)
    intro = (
        f"`{base.text}` with the {method_name(config)} adapter below merged into {len(result.by_layer)} of its weights "
        "by smoa.\nIt is a plain transformers model: nothing else is needed to load it."
    )
    note = f"\n{result.note}\n" if result.note else ""
    precision = f"## Precision\n\nMerged in float32, saved in {result.dtype_name}: {result.in_words()}\n{note}\n"
    front_matter = {"library_name": "transformers", "tags": ["smoa", "merged"]}
    return card_text(result.folder.name, base, config, front_matter, intro, LOADING, precision)
