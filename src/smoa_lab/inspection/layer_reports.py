"""Reports on every adapted layer: its spectrum, and what the adapter changed. For all PEFT methods whose layers can
return their ΔW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from smoa.layers.layer import SmoaLayer
from smoa.maths.analysis import UpdateSpectrum, update_spectrum
from smoa.maths.blocks import Blocks
from smoa.maths.budget import rank_bound
from smoa.maths.spectrum import spectral_scores
from smoa_lab.config.run_config import ModelSection
from smoa_lab.models.base_models import load_base_model
from smoa_lab.runs.layer_updates import adapted_layers, weights_and_updates
from smoa_lab.runs.open_run import adapter_of_run, base_name

TOO_FAR = 0.2
"""‖ΔW‖₂ / ‖W‖₂ from which a layer is marked."""


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer: shape of W, trainable parameters, ‖ΔW‖/‖W‖ (Frobenius), ‖ΔW‖₂/‖W‖₂, ΔW's ranks with the bound
    that the method sets (None where it isn't known), its coverage of W's spectrum, and the spectrum itself.

    SMoA only: ``row_blocks`` and ``col_blocks``, the block of every output and input coordinate, and ``bands``, the
    lowest and highest spectral score of each block's coordinates.
    """

    module: str
    method: str
    rows: int
    columns: int
    parameters: int
    relative_update: float
    relative_spectral_norm: float
    rank: int
    rank_bound: int | None
    effective_rank: float
    stable_rank: float
    coverage: float
    spectrum: UpdateSpectrum
    row_blocks: Tensor | None = None
    col_blocks: Tensor | None = None
    bands: tuple[tuple[float, float], ...] = ()

    @property
    def moved_too_far(self) -> bool:
        """Whether much of what W did is likely to be lost."""
        return self.relative_spectral_norm > TOO_FAR

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the curves left out."""
        names = ("module", "method", "rows", "columns", "parameters", "relative_update", "relative_spectral_norm")
        ranks = ("rank", "rank_bound", "effective_rank", "stable_rank", "coverage", "moved_too_far")
        return {name: getattr(self, name) for name in (*names, *ranks)}


def inspect_layers(adapter: str | Path, base: str | None = None, trust_remote_code: bool = False) -> list[LayerReport]:
    """A report on every adapted layer, in the model's order.

    Raises:
        ConfigError: ``adapter`` is not the folder of an adapter or a run.
        DataError: the base model cannot be loaded.
    """
    source = adapter_of_run(adapter)
    model, _ = load_base_model(ModelSection(name=base_name(source, base), trust_remote_code=trust_remote_code))
    adapted: Any = PeftModel.from_pretrained(model, str(source))
    method = adapted.active_peft_config.peft_type.value.lower()
    layers = list(adapted_layers(adapted.base_model.model))
    shown = tqdm(layers, desc="Decomposing", disable=None, leave=False)
    with torch.no_grad():
        return [report for path, module in shown for report in _reports(path, module, adapted.active_adapter, method)]


def _reports(path: str, module: Any, adapter: str, method: str) -> list[LayerReport]:
    """On each matrix of the layer, which share its trained numbers evenly."""
    found = list(weights_and_updates(path, module, adapter))
    own = [p for name, p in module.named_parameters() if f".{adapter}." in f".{name}." and "base_layer" not in name]
    parameters = sum(parameter.numel() for parameter in own) // len(found)
    blocks = _blocks(module, adapter)
    return [
        _report(name, module, adapter, method, weight, update, parameters, **own_blocks)
        for (name, weight, update), own_blocks in zip(found, blocks or [{}] * len(found), strict=True)
    ]


def _report(
    name: str, module: Any, adapter: str, method: str, weight: Tensor, update: Tensor, parameters: int, **blocks: Any
) -> LayerReport:
    spectrum = update_spectrum(weight, update)
    return LayerReport(
        module=name,
        method=method,
        rows=update.shape[0],
        columns=update.shape[1],
        parameters=parameters,
        relative_update=float(update.norm() / weight.norm()),
        relative_spectral_norm=spectrum.relative_spectral_norm,
        rank=spectrum.rank,
        rank_bound=_rank_bound(module, adapter),
        effective_rank=spectrum.effective_rank,
        stable_rank=spectrum.stable_rank,
        coverage=spectrum.coverage,
        spectrum=spectrum,
        **blocks,
    )


def _rank_bound(module: Any, adapter: str) -> int | None:
    if isinstance(module, SmoaLayer):
        block_ranks = module.ranks[adapter]
        if module.modulation[adapter] == "none":
            return sum(block_ranks)
        sizes = module.out_features, module.in_features
        return rank_bound(*sizes, sum(block_ranks), len(block_ranks), block_ranks)
    ranks = getattr(module, "r", None)
    return int(ranks[adapter]) if isinstance(ranks, dict) and hasattr(module, "lora_A") else None


def _blocks(module: Any, adapter: str) -> list[dict[str, Any]]:
    """Blocks and bands of each matrix of a SMoA layer."""
    if not isinstance(module, SmoaLayer):
        return []
    return [_blocks_of(weight, update.factors.blocks) for _, weight, update in module.parts(adapter)]


def _blocks_of(weight: Tensor, own: Blocks) -> dict[str, Any]:
    scores = torch.cat(spectral_scores(weight))
    labels = torch.cat([own.row_labels, own.col_labels])
    blocks = [scores[labels == block] for block in range(own.num_blocks)]
    return {
        "row_blocks": own.row_labels.cpu(),
        "col_blocks": own.col_labels.cpu(),
        "bands": tuple((float(block.min()), float(block.max())) for block in blocks),
    }
