"""Merges an adapter, or a run's, into its base model: the result is a model that transformers loads without smoa.

ΔW is relative to W, so bfloat16 drops changes of an entry by less than a 512th. Each weight is therefore merged in
float32, and the share of ΔW that rounding to the saved dtype loses is measured.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa.errors import MergeError, first_of
from smoa.files.names import PREFIX
from smoa.merging import note_users
from smoa.tuner.tying import ties_more_than_ends
from smoa_lab import base_models
from smoa_lab.basics.folders import check_place, new_folder, read_stored
from smoa_lab.config.run import ModelSection
from smoa_lab.data.chat_templates import saved_chat_template
from smoa_lab.open_run import adapter_config, adapter_of_run, check_weights, model_of, with_saved_adapter
from smoa_lab.pages.card import NamedBase, card_text, method_name

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""transformers' class for an adapter's task; the others have ``AutoModel``."""
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
COMPANIONS = ("chat_template*", "generation_config.json", "*processor_config.json", "*.py")
LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
DEQUANTIZED_BY_TRANSFORMERS = ("fp8", "mxfp4", "compressed-tensors")
"""Formats of checkpoints that transformers dequantizes while it loads them, if their config has `dequantize`."""
GGUF_NOTE = "The base is a GGUF file: the adapter is merged into its dequantized weights, on which it was trained."
DEQUANTIZED = "The base is quantized. The adapter is merged into its dequantized weights, on which it was used."
SHARE = "smoa_share.json"
"""The file of :func:`store_share`."""
NOTEWORTHY = 0.01
"""Share of ΔW lost to rounding from which on the summary recommends float32."""


@dataclass
class Merged:
    """What `merge_run` did: ``notes`` are sentences for the users of the merged model, ``by_layer`` is ‖error of ΔW‖ /
    ‖ΔW‖ after rounding to the dtype; over all layers ``update`` and ``error`` are ‖ΔW‖² and ‖error of ΔW‖², and
    ``kept`` is ⟨what the rounded weights changed, ΔW⟩."""

    folder: Path
    base: str
    dtype: torch.dtype = torch.float32
    notes: tuple[str, ...] = ()
    by_layer: dict[str, float] = field(default_factory=dict)
    update: float = 0.0
    error: float = 0.0
    kept: float = 0.0

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
        if not torch.isfinite(after).all():
            raise MergeError(f"{name}: the merged weight is NaN or infinite; the adapter is broken")
        if not torch.isfinite(rounded).all():
            raise MergeError(f"{name}: the merged weight is out of the range of {self.dtype}; take float32 or bfloat16")
        update, error = (float(torch.linalg.vector_norm(part)) ** 2 for part in (after - before, rounded - after))
        self.kept += float(((rounded - before) * (after - before)).sum())
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
        return " ".join([said, *advice, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "base": self.base,
            "dtype": self.dtype_name,
            "layers": len(self.by_layer),
            "update_lost": self.lost,
            "update_lost_by_layer": self.by_layer,
            "notes": list(self.notes),
        }


def merge_run(adapter: str | Path, output: str | Path, dtype: Dtype = "auto", base: str | None = None) -> Merged:
    """Merge an adapter (its folder, or a run's, of any PEFT method that can merge) and save the whole model: weights,
    config, tokenizer, generation config, licence files and a model card. It needs the base's size in memory.

    ``output`` is a new folder, which is there when it is complete. "auto" keeps the base's dtype, or uses float32 for a
    base that is quantized or a GGUF file. Of another ``base`` than the recorded one its revision does not matter.
    """
    source, target = adapter_of_run(adapter), Path(output)
    check_place(target, is_new=True)
    check_weights(source)
    config, own = adapter_config(source), model_of(source, base)
    section = own.section
    of_gguf = bool(section.name.endswith(".gguf") or base_models.packaged_name(section.name))
    wanted: Dtype = "float32" if dtype == "auto" and of_gguf else dtype
    with new_folder(target) as folder, torch.no_grad():
        model, notes = _load(section, source, config, wanted)
        result = Merged(target, section.name, model.dtype, (GGUF_NOTE, *notes) if of_gguf else notes)
        model = merge_in_memory(model, source, result)
        own.stopping(model).save_pretrained(folder)
        _save_other_files(section, source, folder)
        card = model_card(base_models.described_base(section.name), folder, config, result)
        (folder / "README.md").write_text(card, encoding="utf-8")
        store_share(folder, result.kept / result.update if result.update else 1.0)
    return result


def store_share(folder: Path, share: float) -> None:
    """Keep beside weights what share of ΔW they have, ⟨what they change, ΔW⟩ / ‖ΔW‖², by which `smoa verify` goes."""
    (folder / SHARE).write_text(json.dumps({"share": share}) + "\n", encoding="utf-8")


def stored_share(folder: Path) -> float | None:
    """What :func:`store_share` kept; None where nothing is."""
    file = folder / SHARE
    return float(read_stored(file, {"share"})["share"]) if file.is_file() else None


def _load(
    section: ModelSection, adapter: Path, config: PeftConfig, dtype: Dtype
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base with plain weights, in the class that the adapter is for and with as many labels and tokens as it has;
    and what to say of it."""
    module, name = class_of(config)
    try:
        chosen = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        reason = f"is for a {name}, which transformers {transformers.__version__} lacks in {module}"
        raise MergeError(f"{adapter}: {reason}; install the release that it was trained with") from error
    saved = load_peft_weights(str(adapter), device="cpu")
    options: dict[str, Any] = dict(section.options)
    own = base_models.base_config(section)
    format_of_base = getattr(own, "quantization_config", None)
    if isinstance(format_of_base, dict) and format_of_base.get("quant_method") in DEQUANTIZED_BY_TRANSFORMERS:
        format_of_base["dequantize"] = True
        options["config"] = own
    elif (labels := _labels(section, chosen, saved)) is not None:
        options |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    computed = "quantization_config" in options  # by a run that quantizes, in the section's dtype
    loaded_in = None if computed else "auto" if format_of_base else dtype
    model, found = base_models.load_weights(section.model_copy(update={"options": options}), chosen, loaded_in)
    new = {*found["missing_keys"], *(mismatched[0] for mismatched in found["mismatched_keys"])}
    lacking, left = sorted(key for key in new if PREFIX + key not in saved), sorted(found["unexpected_keys"])
    if lacking:
        reason = f"lacks {first_of(lacking)}, which the adapter doesn't have either"
        raise MergeError(f"{section.name}: {reason}; give the base model it was trained on")
    if left and not new and name != "AutoModel":  # these have no head, or another one than the checkpoint
        reason = f"has {first_of(left)}, which {name} doesn't load, so the merged model would lack them"
        raise MergeError(f"{section.name}: {reason}; load it in a class that has them, and use merge_and_unload")
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    own_dtype = torch.float32 if is_quantized else model.dtype
    model = with_plain_weights(model, own_dtype if dtype == "auto" else getattr(torch, dtype))
    left_out = [f"Left out, since {name} doesn't load it: {first_of(left)} of the base."] if left else []
    return model, (*([DEQUANTIZED] if is_quantized or format_of_base else []), *left_out)


def class_of(config: PeftConfig) -> tuple[str, str]:
    """Module and name of transformers' class for the adapter's task or, without one, of the class that PEFT noted."""
    noted: dict[str, str] = config.auto_mapping or {}
    if config.task_type is None and noted.get("parent_library", "").startswith("transformers."):
        return noted["parent_library"], noted["base_model_class"]
    task = str(getattr(config.task_type, "value", config.task_type))
    return transformers.__name__, AUTO_CLASSES.get(task, "AutoModel")


def _labels(section: ModelSection, chosen: Any, saved: dict[str, Tensor]) -> int | None:
    """How many labels the adapter's head has, if not as many as the base's.

    A head has any name. It is a saved tensor whose shape the model has with another number of labels only.
    """
    own = base_models.empty_model(section, chosen)
    for name, tensor in own.state_dict().items():
        head = saved.get(PREFIX + name)
        if head is None or head.shape == tensor.shape or head.dim() != tensor.dim():
            continue
        labels = int(own.config.num_labels or 0) + len(head) - len(tensor)
        if labels > 0:
            other = section.model_copy(update={"options": {**section.options, "num_labels": labels}})
            if base_models.empty_model(other, chosen).state_dict()[name].shape == head.shape:
                return labels
    return None


def with_plain_weights(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model with plain weights of the dtype, dequantized if it was quantized."""
    if getattr(model, "hf_quantizer", None) is not None:
        try:
            model = model.dequantize(dtype=dtype)
        except NotImplementedError as error:
            raise MergeError(f"the base can't be dequantized ({error}); give a base that isn't quantized") from error
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    plain: PreTrainedModel = model.to(dtype)  # type: ignore[arg-type]
    return plain


def merge_in_memory(model: PreTrainedModel, adapter: Path, result: Merged) -> PreTrainedModel:
    """Merge the adapter of any PEFT method into `model`, which is changed, one weight at a time in float32."""
    adapted = with_saved_adapter(model, adapter).eval()
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise MergeError(f"{adapter}: PEFT can't merge {kind}, which is more than a change of weights; load it instead")
    stays_tied = ties_more_than_ends(model)
    note_users(adapted)
    for name, layer in layers_to_merge(adapted):
        untie(model, layer)
        layer.merge = partial(_merge_layer, name, layer, layer.merge, result)
    with warnings.catch_warnings():
        own = "the merged end has a weight of its own"
        warnings.filterwarnings("ignore", f"Input and output embeddings are no longer tied after merging|{own}")
        merged: PreTrainedModel = adapted.merge_and_unload().to(result.dtype)
    if stays_tied:
        merged.config.tie_word_embeddings = True
    return merged


def _merge_layer(name: str, layer: Any, merge: Any, result: Merged, *arguments: Any, **options: Any) -> None:
    """Merge a layer in float32, add to the result what rounding loses, and round."""
    weight_of(layer).data = weight_of(layer).data.float()
    before = weight_of(layer).detach().clone()
    try:
        merge(*arguments, **options)
    except (ValueError, NotImplementedError) as error:
        raise MergeError(f"{name}: {error}") from error
    result.add(name, before, weight_of(layer).detach())
    weight_of(layer).data = weight_of(layer).data.to(result.dtype)
    del layer.merge  # a cycle, which would keep the layer and what it needs to unmerge


def layers_to_merge(adapted: Any) -> list[tuple[str, Any]]:
    """The layers to merge by name; of those that share weight and adapter, the first."""
    tuner: Any = adapted.base_model
    layers: dict[int, tuple[str, Any]] = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, tuner.tuner_layer_cls) and isinstance(weight_of(module), Tensor):
            layers.setdefault(id(weight_of(module)) if getattr(module, "twins", ()) else id(module), (name, module))
    return list(layers.values())


def weight_of(layer: Any) -> Any:
    """A layer's weight, or the parameter that it wraps."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)


def untie(model: Any, layer: Any) -> None:
    """Give the layer a weight of its own if another module shares it, because the adapter changes only this layer."""
    base: nn.Module = layer.get_base_layer()
    if getattr(layer, "twins", ()) or weight_of(layer) is not getattr(base, "weight", None):
        return
    users = [module for module in model.modules() if getattr(module, "weight", None) is base.weight]
    if len({id(module) for module in users} - {id(layer)}) > 1:
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        model.config.tie_word_embeddings = False


def _save_other_files(section: ModelSection, adapter: Path, folder: Path) -> None:
    """The tokenizer (the adapter's, else the base's), and the base's generation config, code and licence."""
    place, gguf_file = base_models.locate(section.name)
    base = Path(place)
    if not base.is_dir():
        patterns = [*TOKENIZER, *COMPANIONS, *LEGAL]
        base = Path(snapshot_download(place, allow_patterns=patterns, **base_models.places(section.options)))
    companions: tuple[str, ...] = COMPANIONS
    if any(adapter.glob("tokenizer*")):
        copy_tokenizer(adapter, folder)
        if saved_chat_template(adapter) is not None:  # which a file of the base's would replace
            companions = tuple(pattern for pattern in COMPANIONS if not pattern.startswith("chat_template"))
    elif gguf_file:
        base_models.load_tokenizer(section).save_pretrained(folder)
    else:
        _copy(base, folder, TOKENIZER)
    if not gguf_file:  # else the folder may be anybody's
        _copy(base, folder, (*companions, *LEGAL))


def copy_tokenizer(adapter: Path, folder: Path) -> None:
    """Copy the tokenizer that was saved with an adapter, whose chat template it was trained with, if there is one."""
    _copy(adapter, folder, (*TOKENIZER, "chat_template*"))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in (file for pattern in patterns for file in source.glob(pattern)):
        if file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def model_card(base: NamedBase, folder: Path, config: PeftConfig, result: Merged) -> str:
    """The card as Markdown, with the front matter that model hubs read, and code that loads what `folder` has."""
    loads = {"model": class_of(config)[1]}
    if any(folder.glob("*processor_config.json")):
        loads["processor"] = "AutoProcessor"
    elif any(folder.glob("tokenizer*")):
        loads["tokenizer"] = "AutoTokenizer"
    lines = (f'{name} = {auto}.from_pretrained("PATH")' for name, auto in loads.items())
    loading = "\n".join([f"from transformers import {', '.join(loads.values())}", "", *lines])
    intro = (
        f"`{base.text}` with the {method_name(config)} adapter below merged into {len(result.by_layer)} of its weights "
        "by smoa.\nIt is a plain transformers model: nothing else is needed to load it."
    )
    notes = "".join(f"\n{note}\n" for note in result.notes)
    precision = f"## Precision\n\nMerged in float32, saved in {result.dtype_name}: {result.in_words()}\n{notes}\n"
    front_matter = {"library_name": "transformers", "tags": ["smoa", "merged"]}
    return card_text(result.folder.name, base, config, front_matter, intro, loading, precision)
