"""What becomes of an adapter, or a run's: a model that transformers loads without smoa, a LoRA for engines that load
nothing else, and whether these say what the adapter says.

ΔW is relative to W, so bfloat16 drops changes of an entry by less than a 512th. Each weight is therefore merged in
float32, and the share of ΔW that rounding to the saved dtype loses is measured. The best LoRA of rank k keeps the k
largest singular values of ΔW (Eckart and Young, 1936). Models are compared by the logits after ten prompts: of the
change that the adapter makes, the share that a target makes too has to be near one, and what else it changes has to be
small. The largest difference alone would pass an untouched base in bfloat16.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from smoa import ConfigError, MergeError
from smoa_lab.base_models import RunModel, described_base, load_tokenizer, load_weights, packaged_name
from smoa_lab.basics.files import check_new, new_folder
from smoa_lab.config.run import ModelSection
from smoa_lab.data.general_text import STORY, passages
from smoa_lab.open_run import open_place
from smoa_lab.pages.card import card_text, method_name
from smoa_lab.scoring.losses import logits_at

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DEQUANTIZED = "The base is quantized. The adapter is merged into its dequantized weights, on which it was used."
NOTEWORTHY = 0.01
"""Share of ΔW lost to rounding from which on the summary recommends float32."""
LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""
PROMPTS, WORDS = 10, 24
"""How many prompts there are, and how long each is."""
TOLERANCE = 0.1
"""By how much the share of the adapter's change that a target has may differ from one."""
NOISE = 1.0
"""How large, relative to that change, what else a target changes may be."""
IN_MEMORY = "merged"
"""The target that is merged in memory."""


@dataclass
class Merged:
    """What a merge did: ``by_layer`` is ‖error of ΔW‖ / ‖ΔW‖ after rounding to the dtype; over all layers ``update``
    and ``error`` are ‖ΔW‖² and ‖error of ΔW‖². ``note`` is for the users of the merged model."""

    folder: str
    base: str
    saved_dtype: str = "float32"
    note: str = ""
    by_layer: dict[str, float] = field(default_factory=dict)
    update: float = 0.0
    error: float = 0.0

    @property
    def lost(self) -> float:
        """‖error of ΔW‖ / ‖ΔW‖ over all layers, 0 if nothing changes."""
        return (self.error / self.update) ** 0.5 if self.update else 0.0

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.saved_dtype)
        return found

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Add one layer, given its weight before and after the merge, in float32."""
        rounded = after.to(self.dtype)
        if not torch.isfinite(rounded).all():
            rule = "a broken adapter, or a range too small; --dtype float32 has the largest"
            raise MergeError(f"{name}: the merged weight in {self.saved_dtype} is NaN or infinite: {rule}")
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
        said = f"{len(self.by_layer)} weights merged in float32, saved in {self.saved_dtype}: {self.in_words()}"
        advice = ["--dtype float32 loses almost nothing."] if self.lost >= NOTEWORTHY else []
        return " ".join([said, *advice, *filter(None, [self.note])])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"lost": self.lost}


def merge_run(place: str | Path, output: Path, dtype: Dtype = "auto", base: str | None = None) -> Merged:
    """Merge an adapter (its folder, or a run's, of any PEFT method that can merge) and save the whole language model:
    weights, config, tokenizer, generation config and a model card. It needs the base's size in memory.

    ``output`` is a new folder, which is there when it is complete. "auto" keeps the base's dtype, or uses float32 for a
    base that is quantized or a GGUF file.
    """
    opened = open_place(place, base)
    adapter, model, config = opened.adapter, opened.model, PeftConfig.from_pretrained(str(opened.adapter))
    of_file = model.section.name.endswith(".gguf") or packaged_name(model.section.name)
    with new_folder(output) as folder, torch.no_grad():
        loaded, note = plain_base(model, "float32" if dtype == "auto" and of_file else dtype)
        result = Merged(str(output), model.section.name, str(loaded.dtype).removeprefix("torch."), note)
        model.stopping(merge_in_memory(loaded, adapter, result)).save_pretrained(folder)
        has_own = any(adapter.glob("tokenizer*"))
        tokenizer = load_tokenizer(ModelSection(name=str(adapter))) if has_own else model.tokenizer
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(config, result), encoding="utf-8")
    return result


def plain_base(model: RunModel, dtype: Dtype = "float32") -> tuple[PreTrainedModel, str]:
    """The base with plain weights of a dtype, dequantized if it is quantized, and what to say of that. "auto" is its
    own, and float32 for a quantized one."""
    # a run that quantizes computes in its own dtype
    loaded = load_weights(model.section, None if "quantization_config" in model.section.options else dtype)
    is_quantized = getattr(loaded, "hf_quantizer", None) is not None
    wanted = (torch.float32 if is_quantized else loaded.dtype) if dtype == "auto" else getattr(torch, dtype)
    if is_quantized:
        loaded = loaded.dequantize(dtype=wanted)
        vars(loaded.config).pop("quantization_config", None)
    plain: PreTrainedModel = loaded.to(wanted)  # type: ignore[arg-type]
    return plain, DEQUANTIZED if is_quantized else ""


def merge_in_memory(model: PreTrainedModel, adapter: Path, result: Merged) -> PreTrainedModel:
    """Merge the adapter of any PEFT method into `model`, which is changed, one weight at a time in float32."""
    adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
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
    base = described_base(result.base)
    intro = (
        f"`{base.text}` with the {method_name(config)} adapter below merged into {len(result.by_layer)} of its weights "
        "by smoa.\nIt is a plain transformers model: nothing else is needed to load it."
    )
    note = f"\n{result.note}\n" if result.note else ""
    precision = f"## Precision\n\nMerged in float32, saved in {result.saved_dtype}: {result.in_words()}\n{note}\n"
    front_matter = {"library_name": "transformers", "tags": ["smoa", "merged"]}
    return card_text(Path(result.folder).name, base, config, front_matter, intro, LOADING, precision)


@torch.no_grad()
def convert_run(place: str | Path, output: Path, rank: int | float, base: str | None = None) -> dict[str, Any]:
    """Write a LoRA to the new folder ``output``, and say what it loses of the adapter: ``error`` is ‖ΔW − BA‖ / ‖ΔW‖
    over all layers.

    ``rank`` is that of every layer or, as a float in (0, 1], the share of ‖ΔW‖² that each layer keeps at the least rank
    that does. ``options`` are those with which the run loads its base: PEFT's files have no place for them.
    """
    check_new(output)
    opened = open_place(place, base)
    model = PeftModel.from_pretrained(plain_base(opened.model)[0], str(opened.adapter))
    own: Any = model.active_peft_config
    if own.peft_type.value != "SMOA":
        raise ConfigError(f"{opened.adapter}: is a {own.peft_type.value} adapter; only SMoA's are converted to LoRA")
    config, state = peft.convert_to_lora(model, rank)
    section = opened.model.section
    config.base_model_name_or_path = packaged_name(section.name) or section.name
    config.revision, config.task_type = section.options.get("revision"), own.task_type
    config.fan_in_fan_out = any(getattr(layer, "fan_in_fan_out", False) for layer in model.modules())
    update = error = 0.0
    ranks = []
    for name, layer in model.named_modules():
        if (A := state.get(f"{name}.lora_A.weight")) is not None:
            delta, product = layer.get_delta_weight("default").float(), state[f"{name}.lora_B.weight"] @ A
            product = product if product.shape == delta.shape else product.T  # GPT-2's layers are transposed
            update += float(delta.square().sum())
            error += float((delta - product).square().sum())
            ranks.append(len(A))
    with new_folder(output) as folder:
        config.save_pretrained(str(folder))
        save_file(state, folder / SAFETENSORS_WEIGHTS_NAME)
        opened.model.tokenizer.save_pretrained(folder)
    return {
        "folder": str(output),
        "rank": max(ranks),
        "parameters": sum(tensor.numel() for key, tensor in state.items() if ".lora_" in key),
        "adapter_parameters": sum(each.numel() for name, each in model.named_parameters() if ".smoa_" in name),
        "error": (error / update) ** 0.5 if update else 0.0,
        "options": {key: value for key, value in section.options.items() if key != "revision"},
    }


@dataclass(frozen=True)
class Verdict:
    """``share`` is how much of what the adapter changes is there: ⟨target − base', adapter − base⟩ / ‖adapter − base‖²
    over all logits, base' rounded as the target's weights are; ``noise`` is ‖what else the target changes‖ / ‖adapter −
    base‖, and ``difference`` the largest between two logits of adapter and target, relative to the largest logit."""

    target: str
    share: float
    noise: float
    difference: float

    @property
    def agrees(self) -> bool:
        return abs(self.share - 1) <= TOLERANCE and self.noise <= NOISE

    def line(self) -> str:
        """The verdict for people."""
        return (
            f"{'agrees' if self.agrees else 'DIFFERS'}  {self.target}: has {self.share:.1%} of what the adapter "
            f"changes, noise {self.noise:.1%}; largest difference of a logit {self.difference:.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"agrees": self.agrees}


@torch.no_grad()
def verify(place: str | Path, targets: Sequence[str] = (IN_MEMORY,), base: str | None = None) -> list[Verdict]:
    """Compare an adapter, unmerged and in float32, with what it was made into.

    A target is a folder with a merged model or with another adapter of the base, such as a LoRA; or ``merged``, which
    merges in memory. Each is loaded by itself, on a base that no adapter has touched. Raises ConfigError for a target
    that is neither, and where the adapter changes nothing.
    """
    opened = open_place(place, base)
    adapter = opened.adapter
    for target in targets:
        if target != IN_MEMORY and not any(Path(target, name).is_file() for name in (CONFIG_NAME, MODEL_CONFIG_NAME)):
            raise ConfigError(f"--against {target}: is neither merged, nor a model's folder, nor an adapter's")
    logger.info("Comparing the logits after %d prompts", PROMPTS)
    prompts = [" ".join(text.split()[:WORDS]) for text in passages(STORY)[:PROMPTS]]
    ids = [opened.model.tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    model = plain_base(opened.model)[0]
    untouched = {torch.float32: logits_after(model, ids)}
    own = logits_after(PeftModel.from_pretrained(model, str(adapter)), ids)
    del model
    change, largest = (own - untouched[torch.float32]).double(), float(own.abs().max())
    if not change.any():
        raise ConfigError(f"{adapter}: changes nothing: it is untrained, or of another model")
    verdicts = []
    for target in targets:
        dtype = torch.float32
        if target == IN_MEMORY:
            other: Any = merge_in_memory(plain_base(opened.model)[0], adapter, Merged(target, ""))
        elif Path(target, CONFIG_NAME).is_file():
            other = PeftModel.from_pretrained(plain_base(opened.model)[0], target)
        else:
            other = load_weights(ModelSection(name=target), "auto")
            dtype = other.dtype
            other.float()
        found = logits_after(other, ids)
        if dtype not in untouched:
            rounded = plain_base(opened.model)[0]
            for weight in rounded.parameters():  # not rotary buffers, which stay in float32
                weight.data = weight.data.to(dtype).float()
            untouched[dtype] = logits_after(rounded, ids)
        there, size = (found - untouched[dtype]).double(), float(change.square().sum())
        share = float((change * there).sum()) / size
        noise = float((there - share * change).norm()) / size**0.5
        verdicts.append(Verdict(target, share, noise, float((found - own).abs().max()) / largest))
    return verdicts


@torch.no_grad()
def logits_after(model: Any, ids: Sequence[Tensor]) -> Tensor:
    """Those after each prompt, in float32: (prompts, vocabulary)."""
    model.eval()
    found = []
    for each in ids:
        with logits_at(model, torch.arange(each.shape[1])[None] == each.shape[1] - 1):
            found.append(model(input_ids=each.to(model.device)).logits[:, -1].float().cpu())
    return torch.cat(found)
