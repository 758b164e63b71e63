"""``smoa inspect``: what an adapter did to each layer. Works for every PEFT method whose layers tell their ΔW."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

import smoa  # noqa: F401  (registers SMoA with PEFT)
from smoa.experiments.base_models import BaseModel, load_base_model
from smoa.experiments.merge import adapter_folder


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer: shape of W, trainable parameters, ‖ΔW‖/‖W‖ (Frobenius), the numerical rank of ΔW and its
    effective rank, exp of the entropy of its normalised singular values (Roy and Vetterli, 2007)."""

    module: str
    rows: int
    columns: int
    parameters: int
    relative_update: float
    rank: int
    effective_rank: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def inspect(adapter: str | Path, base: str | None = None, trust_remote_code: bool = False) -> list[LayerReport]:
    """A report on every adapted layer, in the model's order.

    Raises:
        ConfigError: ``adapter`` is no adapter's folder.
        DataError: the base model cannot be loaded.
    """
    source = adapter_folder(adapter)
    name = base or str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    model, _ = load_base_model(BaseModel(name, "float32", trust_remote_code))
    adapted: Any = PeftModel.from_pretrained(model, str(source))
    layers = [(path, module) for path, module in adapted.base_model.model.named_modules() if _tells_update(module)]
    with torch.no_grad():
        return [_report(path, module, adapted.active_adapter) for path, module in layers]


def _tells_update(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")


def _report(path: str, module: Any, adapter: str) -> LayerReport:
    weight = module.get_base_layer().weight
    update = module.get_delta_weight(adapter).float()
    singular = torch.linalg.svdvals(update)
    own = [p for name, p in module.named_parameters() if f".{adapter}." in f".{name}." and "base_layer" not in name]
    return LayerReport(
        module=path,
        rows=update.shape[0],
        columns=update.shape[1],
        parameters=sum(parameter.numel() for parameter in own),
        relative_update=float(update.norm() / weight.float().norm()),
        rank=_numerical_rank(singular, max(update.shape)),
        effective_rank=_effective_rank(singular),
    )


def _numerical_rank(singular: Tensor, size: int) -> int:
    return int((singular > singular.max() * size * torch.finfo(singular.dtype).eps).sum()) if singular.max() else 0


def _effective_rank(singular: Tensor) -> float:
    share = singular / singular.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0
