"""Writes the table of what can be adapted into docs/what-works.md: every cell is tried, with SMoA, LoRA and HiRA.

Run it with PEFT 0.21, which has all three. The rows are the kinds of `smoa.model.LAYERS`, some quantized or grouped,
and one that SMoA refuses.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

from smoa import SmoaConfig
from smoa.model import LAYERS

PAGE = Path(__file__).parents[1] / "what-works.md"
MARKERS = "<!-- layer kinds: written by docs/figures/layer_kinds.py -->\n", "<!-- end of the layer kinds -->\n"
COLUMNS = ("trained", "merged", "unmerged bit for bit", "mixed batch", "converted to LoRA")
Layer = Callable[[], nn.Module]
TOKENS = torch.tensor([[3, 5, 1], [7, 2, 2]])


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer's weight holds floating-point numbers."""
    weight = getattr(layer, "weight", None)
    return weight is None or weight.is_floating_point()


class Model(nn.Module):
    """One layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit = self.is_loaded_in_8bit = not is_plain(layer)  # transformers sets one of them

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _in_bits(bits: int) -> nn.Module:
    import bitsandbytes

    linear = nn.Linear(64, 64)
    quantized = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    layer = quantized(64, 64, **({} if bits == 4 else {"has_fp16_weights": False}))
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _conv(dimensions: int, groups: int = 1) -> tuple[Layer, Tensor]:
    kind = getattr(nn, f"Conv{dimensions}d")
    return lambda: kind(8, 8, 3, groups=groups), torch.randn(2, 8, *[4] * dimensions)


def _experts() -> nn.Module:
    experts = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=3))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


ROWS: dict[str, tuple[Layer, Tensor]] = {
    "`nn.Linear`": (lambda: nn.Linear(8, 8), torch.randn(2, 8)),
    "`nn.Linear` in 4 bits": (lambda: _in_bits(4), torch.randn(2, 64)),
    "in 8 bits (bitsandbytes)": (lambda: _in_bits(8), torch.randn(2, 64)),
    "`Conv1D` of transformers": (lambda: Conv1D(8, 8), torch.randn(2, 8)),
    "`nn.Embedding`": (lambda: nn.Embedding(12, 8), TOKENS),
    "`nn.Conv1d`": _conv(1),
    "`nn.Conv2d`": _conv(2),
    "`nn.Conv2d` with groups": _conv(2, groups=2),
    "`nn.Conv3d`": _conv(3),
    "experts of Qwen3-MoE": (_experts, torch.randn(4, 16)),
    "`nn.MultiheadAttention`": (lambda: nn.MultiheadAttention(8, 2), torch.randn(2, 8)),
}


def configs() -> dict[str, Any]:
    """One config of each method, whose adapter does something at the start."""
    return {
        "SMoA": SmoaConfig(r=4, init_weights=False, target_modules=["layer"]),
        "LoRA": LoraConfig(r=4, init_lora_weights=False, target_modules=["layer"]),
        "HiRA": peft.HiraConfig(r=4, init_weights=False, target_modules=["layer"]),
    }


class Trial:
    """One method on one kind of layer: a method for each column, which raises or returns False if it does not work."""

    def __init__(self, layer: Layer, x: Tensor, config: Any) -> None:
        torch.manual_seed(0)
        self.base, self.x, self.config = layer(), x, copy.deepcopy(config)
        self.has_experts = isinstance(self.base, Qwen3MoeExperts)
        if self.has_experts:
            self.config.target_modules, self.config.target_parameters = [], ["layer.gate_up_proj"]
        self.model = self._adapted()

    def _adapted(self) -> PeftModel:
        model = get_peft_model(Model(copy.deepcopy(self.base)), copy.deepcopy(self.config))
        for name, parameter in model.named_parameters():
            if ".default" in name and parameter.requires_grad:  # HiRA has no visible start in every layer
                nn.init.normal_(parameter, std=0.5)
        return model.eval()

    def trained(self) -> bool:
        self._run(self.model).sum().backward()
        return any(p.grad is not None and p.grad.abs().sum() > 0 for p in self.model.parameters())

    def _run(self, model: nn.Module, **options: Any) -> Tensor:
        layer = (model.base_model.model if isinstance(model, PeftModel) else model).layer
        if isinstance(self.base, nn.MultiheadAttention):
            return layer(self.x, self.x, self.x)[0]
        if self.has_experts:
            chosen = torch.tensor([[0, 2]] * len(self.x))
            return layer(self.x, chosen, torch.full(chosen.shape, 0.5), **options)
        return model(self.x, **options)

    def _weight(self, model: PeftModel) -> Tensor:
        base = model.base_model.model.layer.get_base_layer()
        return base.gate_up_proj if self.has_experts else base.weight

    def merged(self) -> bool:
        before, alone = self._run(self.model), self._run(Model(self.base))
        merged = self.model.merge_and_unload(safe_merge=True)
        after = self._run(merged)
        kept = torch.allclose(after, before, rtol=1e-4, atol=1e-4) or not is_plain(self.base)
        return type(merged.layer) is type(self.base) and kept and not torch.equal(after, alone)

    def unmerged_bit_for_bit(self) -> bool:
        model = self._adapted()
        weight = self._weight(model).detach().clone()
        model.merge_adapter()
        model.unmerge_adapter()
        return torch.equal(self._weight(model), weight)

    def mixed_batch(self) -> bool:
        model = self._adapted()
        alone = self._run(model)
        mixed = self._run(model, adapter_names=["default", "__base__"])
        return torch.allclose(mixed[0], alone[0], atol=1e-4) and not torch.allclose(mixed[1], alone[1], atol=1e-4)

    def converted_to_lora(self) -> bool:
        if isinstance(self.config, LoraConfig):
            return False  # it is one
        return peft.convert_to_lora(self._adapted(), rank=4) is not None


def works(layer: Layer, x: Tensor, config: Any) -> dict[str, bool]:
    """What of the columns works."""
    found = dict.fromkeys(COLUMNS, False)
    for column in COLUMNS:
        try:
            found[column] = getattr(Trial(layer, x, config), column.lower().replace(" ", "_"))()
        except Exception:  # whatever it raises, it does not work
            found[column] = False
    return found


def lines() -> Iterator[str]:
    """The table in Markdown: in each cell the methods for which it works. Layers with the same cells share a row."""
    yield f"| layer | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    names: dict[str, list[str]] = {}
    for name, (layer, x) in ROWS.items():
        of_methods = {method: works(layer, x, config) for method, config in configs().items()}
        cells = (", ".join(m for m, found in of_methods.items() if found[column]) or "–" for column in COLUMNS)
        names.setdefault(" | ".join(cells), []).append(name)
    for cells_of_all, alike in names.items():
        yield f"| {', '.join(alike)} | {cells_of_all} |"


def missing() -> list[type[nn.Module]]:
    """Classes of layers without a row."""
    return [known for known in LAYERS if not any(isinstance(layer(), known) for layer, _ in ROWS.values())]


def page() -> str:
    """docs/what-works.md with the current table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = "\n".join(lines())
    return f"{before}{MARKERS[0]}{table}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
