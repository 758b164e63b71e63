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
from smoa_lab.models.base_models import load_base_model
from smoa_lab.runs.layer_updates import adapted_layers, weights_and_updates
from smoa_lab.runs.open_run import adapter_of_run, base_section

TOO_FAR = {"relative_update": 0.06, "relative_spectral_norm": 0.2}
"""Figures from which a layer is marked: in studies/retention-pilot and -seeds a layer exceeded one of them in all
runs that forgot more than 0.15 nats of the first task, and in no other run."""


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer: shape of W, trainable parameters, ‖ΔW‖/‖W‖ (Frobenius), ‖ΔW‖₂/‖W‖₂, ΔW's ranks with the bound
    that the method sets (None where it isn't known), its coverage of W's spectrum, and the spectrum itself.

    SMoA only, by block: ``bands``, the lowest and highest spectral score of its coordinates, ``block_scales``, its
    scale s_k, and the spectrum's ``block_coverages``.
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
    bands: tuple[tuple[float, float], ...] = ()
    block_scales: tuple[float, ...] = ()

    @property
    def moved_too_far(self) -> bool:
        """Whether much of what W did is likely to be lost."""
        return any(getattr(self, figure) > limit for figure, limit in TOO_FAR.items())

    def told(self, figure: str) -> str:
        """A figure of ``TOO_FAR`` as text, with a mark where it is too large."""
        value: float = getattr(self, figure)
        return f"{'! ' * (value > TOO_FAR[figure])}{value:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the curves left out."""
        names = ("module", "method", "rows", "columns", "parameters", "relative_update", "relative_spectral_norm")
        ranks = ("rank", "rank_bound", "effective_rank", "stable_rank", "coverage", "moved_too_far")
        blocks = {"block_scales": list(self.block_scales), "block_coverages": list(self.spectrum.block_coverages)}
        return {name: getattr(self, name) for name in (*names, *ranks)} | (blocks if self.block_scales else {})


def inspect_layers(adapter: str | Path, base: str | None = None, trust_remote_code: bool = False) -> list[LayerReport]:
    """A report on every adapted layer, in the model's order.

    Raises:
        ConfigError: ``adapter`` is not the folder of an adapter or a run.
        DataError: the base model cannot be loaded.
    """
    source = adapter_of_run(adapter)
    model, _ = load_base_model(base_section(source, base, trust_remote_code))
    adapted: Any = PeftModel.from_pretrained(model, str(source))
    method = adapted.active_peft_config.peft_type.value.lower()
    layers = list(adapted_layers(adapted.base_model.model))
    shown = tqdm(layers, desc="Decomposing", disable=None, leave=False)
    with torch.no_grad():
        return [report for path, module in shown for report in _reports(path, module, adapted.active_adapter, method)]


def _reports(path: str, module: Any, adapter: str, method: str) -> list[LayerReport]:
    """A report on each matrix of the layer; the matrices share its trained parameters evenly."""
    found = list(weights_and_updates(path, module, adapter))
    own = [p for name, p in module.named_parameters() if f".{adapter}." in f".{name}." and "base_layer" not in name]
    shared = {
        "method": method,
        "parameters": sum(parameter.numel() for parameter in own) // len(found),
        "rank_bound": _rank_bound(module, adapter),
    }
    blocks: list[Blocks | None] = [None] * len(found)
    scales: list[list[float]] = [[]] * len(found)
    if isinstance(module, SmoaLayer):
        blocks = [update.factors.blocks for _, _, update in module.parts(adapter)]
        scales = (module.scaling[adapter] * module.block_scale(adapter).reshape(len(found), -1)).tolist()
    return [
        _report(*matrix, own_blocks, block_scales=tuple(own_scales), **shared)
        for matrix, own_blocks, own_scales in zip(found, blocks, scales, strict=True)
    ]


def _report(name: str, weight: Tensor, update: Tensor, blocks: Blocks | None, **shared: Any) -> LayerReport:
    spectrum = update_spectrum(weight, update, blocks)
    return LayerReport(
        module=name,
        rows=update.shape[0],
        columns=update.shape[1],
        relative_update=float(update.norm() / weight.norm()),
        relative_spectral_norm=spectrum.relative_spectral_norm,
        rank=spectrum.rank,
        effective_rank=spectrum.effective_rank,
        stable_rank=spectrum.stable_rank,
        coverage=spectrum.coverage,
        spectrum=spectrum,
        bands=() if blocks is None else _bands(weight, blocks),
        **shared,
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


def _bands(weight: Tensor, blocks: Blocks) -> tuple[tuple[float, float], ...]:
    """The least and the largest spectral score in each block."""
    scores, labels = torch.cat(spectral_scores(weight)), torch.cat([blocks.row_labels, blocks.col_labels])
    by_block = [scores[labels == block] for block in range(blocks.num_blocks)]
    return tuple((float(block.min()), float(block.max())) for block in by_block)
