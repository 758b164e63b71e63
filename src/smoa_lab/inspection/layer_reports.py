"""Reports on every adapted layer: its spectrum, and what the adapter changed. For all PEFT methods whose layers can
return their ΔW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from smoa.layers.layer import SmoaLayer
from smoa.maths.analysis import UpdateSpectrum, update_spectrum
from smoa.maths.blocks import Blocks
from smoa.maths.budget import rank_bound
from smoa.maths.spectrum import spectral_scores
from smoa_lab.config.run_config import ModelSection
from smoa_lab.models.base_models import load_base_model
from smoa_lab.runs.layer_updates import adapted_layers, weight_and_update
from smoa_lab.runs.open_run import adapter_of_run, base_name

TOO_FAR = 0.2
"""‖ΔW‖₂ / ‖W‖₂ from which a layer is marked."""


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
        return self.relative_spectral_norm > TOO_FAR

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
    model, _ = load_base_model(ModelSection(name=base_name(source, base), trust_remote_code=trust_remote_code))
    adapted: Any = PeftModel.from_pretrained(model, str(source))
    method = adapted.active_peft_config.peft_type.value.lower()
    layers = list(adapted_layers(adapted.base_model.model))
    shown = tqdm(layers, desc="Decomposing", disable=None, leave=False)
    with torch.no_grad():
        return [_report(path, module, adapted.active_adapter, method) for path, module in shown]


def _report(path: str, module: Any, adapter: str, method: str) -> LayerReport:
    weight, update = weight_and_update(module, adapter)
    blocks = module.blocks(adapter) if isinstance(module, SmoaLayer) else None
    spectrum = update_spectrum(weight, update, blocks)
    own = [p for name, p in module.named_parameters() if f".{adapter}." in f".{name}." and "base_layer" not in name]
    return LayerReport(
        module=path,
        method=method,
        rows=update.shape[0],
        columns=update.shape[1],
        parameters=sum(parameter.numel() for parameter in own),
        relative_update=float(update.norm() / weight.norm()),
        relative_spectral_norm=spectrum.relative_spectral_norm,
        rank=spectrum.rank,
        rank_bound=_rank_bound(module, adapter),
        effective_rank=spectrum.effective_rank,
        stable_rank=spectrum.stable_rank,
        coverage=spectrum.coverage,
        spectrum=spectrum,
        **({} if blocks is None else _by_block(module, adapter, blocks)),
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


def _by_block(module: SmoaLayer, adapter: str, blocks: Blocks) -> dict[str, Any]:
    scores = torch.cat(spectral_scores(module.pristine_weight()))
    labels = torch.cat([blocks.row_labels, blocks.col_labels])
    by_block = [scores[labels == block] for block in range(blocks.num_blocks)]
    scales = module.scaling[adapter] * module.block_scale(adapter)
    return {
        "bands": tuple((float(block.min()), float(block.max())) for block in by_block),
        "block_scales": tuple(scales.tolist()),
    }
