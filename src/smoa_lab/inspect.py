"""What an adapter changed in each layer: ΔW, its norms, ranks and spectrum. For all PEFT methods that can merge.

With `W = U diag(σ) Vᵀ` (economy, σ descending) the energy of ΔW on input direction j is `‖ΔW v_j‖²`, and on output
direction j `‖u_jᵀ ΔW‖²`. Coverage is the mean of `j / q` under that energy, q = min(m, n). It is near 0 if the update
acts on the leading directions only, and 0.5 if it acts on all directions alike.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from smoa import MergeError
from smoa.layer import SmoaLayer
from smoa.partition import block_sizes
from smoa.spectrum import decomposition_device
from smoa_lab.base_models import load_weights
from smoa_lab.export import weight_of
from smoa_lab.open_run import open_place
from smoa_lab.pages.charts import LINE_LEGEND, colors, dashes, values
from smoa_lab.pages.tables import Table

logger = logging.getLogger(__name__)

TOO_FAR = {"relative_update": 0.06, "relative_spectral_norm": 0.2}
"""Figures from which a layer is marked: in studies/retention-pilot and -seeds a layer exceeded one of them in all
runs that forgot more than 0.15 nats of the first task, and in no other run."""

FAR = TOO_FAR["relative_spectral_norm"]
PANEL, COLUMNS = 144, 4
"""Pixels of a panel of the picture, and how many stand side by side."""
NOT_SHOWN = ("bias", "modules_to_save")
"""Settings by which an adapter trains more than matrices."""


@dataclass(frozen=True)
class LayerReport:
    """What an adapter of a ``method`` changed in one layer.

    Args:
        rows, columns: The shape of W.
        parameters: How many the adapter trains there.
        rank_bound: The largest rank of ΔW that the method allows; None where it isn't known.
        block_scales: SMoA's scale s_k of each block; empty for other methods.
        relative_update: ‖ΔW‖_F / ‖W‖_F.
        relative_spectral_norm: ‖ΔW‖₂ / ‖W‖₂: the farthest that the update can move an output, relative to the farthest
            that W can.
        rank: How many singular values of ΔW are above σ_max·q·ε, with ε of float32.
        stable_rank: ‖ΔW‖_F² / ‖ΔW‖₂²; 0 if ΔW is zero.
        coverage: Mean of `j / q` under the energy on both sides; 0 if ΔW is zero.
        update_values: The singular values of ΔW, descending (q,).
    """

    module: str
    method: str
    rows: int
    columns: int
    parameters: int
    rank_bound: int | None
    block_scales: tuple[float, ...]
    relative_update: float
    relative_spectral_norm: float
    rank: int
    stable_rank: float
    coverage: float
    update_values: Tensor

    @property
    def moved_too_far(self) -> bool:
        """Whether much of what W did is likely to be lost."""
        return any(getattr(self, figure) > limit for figure, limit in TOO_FAR.items())

    def marked(self, figure: str) -> str:
        """A figure of ``TOO_FAR`` as text, with a mark where it is too large."""
        value: float = getattr(self, figure)
        return f"{'! ' * (value > TOO_FAR[figure])}{value:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the singular values."""
        figures = {name: value for name, value in vars(self).items() if name != "update_values"}
        return figures | {"moved_too_far": self.moved_too_far}


def inspect_layers(adapter: str | Path, base: str | None = None) -> list[LayerReport]:
    """A report on every adapted layer, in the model's order."""
    opened = open_place(adapter, base)
    source, section = opened.adapter, opened.model.section
    dtype = None if "quantization_config" in section.options else "float32"
    adapted: Any = PeftModel.from_pretrained(load_weights(section, dtype=dtype), str(source))
    config: Any = adapted.active_peft_config
    others = [key for key in NOT_SHOWN if getattr(config, key, None) not in (None, [], {}, "none")]
    if others:
        logger.warning("%s: what it trained by %s is not shown", source, ", ".join(others))
    method = config.peft_type.value.lower()
    layers = list(adapted_layers(adapted.base_model.model))
    if not layers:
        raise MergeError(f"{source}: {method} changes no weight matrix of a layer, so there is no ΔW to show")
    counted = set[int]()
    with torch.no_grad():
        return [
            report
            for path, module in tqdm(layers, desc="Decomposing", disable=None, leave=False)
            for report in _reports(path, module, adapted.active_adapter, method, counted)
        ]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers in which a matrix is changed, by their paths, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight = weight_of(module)
            if isinstance(module, SmoaLayer) or (isinstance(weight, Tensor) and weight.ndim > 1):
                yield path, module


@torch.no_grad()
def weights_and_updates(path: str, module: Any, adapter: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every matrix that the adapter changes in a layer: its name, W, dequantized if it is quantized, and ΔW, in
    float32. A layer has one, named as the layer, a convolution (out, in · kernel); experts have one for each expert or,
    with SMoA on gate and up, two.

    Of other methods ΔW is what a merge adds to W, computed in float64: HiRA's ``get_delta_weight`` is the factor that W
    is multiplied with, and DoRA's leaves its magnitudes out.
    """
    if isinstance(module, SmoaLayer):
        for part, weight, update in module.parts(adapter):
            name = f"{path.replace('.base_layer', '')}.{part}" if part else path
            yield name, weight.float(), update.delta(weight).float()
        return
    merged = deepcopy(module).double()
    before = weight_of(merged).clone()
    try:
        merged.merge(adapter_names=[adapter])
    except (NotImplementedError, ValueError) as error:
        raise MergeError(f"{path}: ΔW is what a merge adds, and PEFT can't merge this method: {error}") from error
    weight, update = before.float(), (weight_of(merged) - before).float()
    if (parameter := getattr(module, "parameter_name", None)) is None:
        yield path, weight.flatten(1), update.flatten(1)
        return
    name = f"{path.replace('.base_layer', '')}.{parameter}"
    if weight.ndim == 2:
        yield name, weight, update
        return
    if getattr(module.get_base_layer(), "is_transposed", False):  # (experts, in, out)
        weight, update = weight.mT, update.mT
    yield from ((f"{name}[{number}]", *pair) for number, pair in enumerate(zip(weight, update, strict=True)))


def _reports(path: str, module: Any, adapter: str, method: str, counted: set[int]) -> Iterator[LayerReport]:
    """A report on each matrix of the layer; the matrices share its trained parameters evenly, without those ``counted``
    in a layer before, which share a tensor."""
    matrices = list(weights_and_updates(path, module, adapter))
    of_layer = (
        parameter
        for name, parameter in module.named_parameters()
        if f".{adapter}." in f".{name}." and name.partition(".")[0] in module.adapter_layer_names
    )
    own = {id(parameter): parameter.numel() for parameter in of_layer}
    parameters = sum(number for key, number in own.items() if key not in counted) // len(matrices)
    counted.update(own)
    bound = _rank_bound(module, adapter)
    scales: list[list[float]] = [[]] * len(matrices)
    if isinstance(module, SmoaLayer):
        scales = (module.scaling[adapter] * module.adapters[adapter].block_scale.reshape(len(matrices), -1)).tolist()
    for (name, weight, update), block_scales in zip(matrices, scales, strict=True):
        (rows, columns), figures = update.shape, spectral_figures(weight, update)
        yield LayerReport(name, method, rows, columns, parameters, bound, tuple(block_scales), **figures)


def _rank_bound(module: Any, adapter: str) -> int | None:
    if isinstance(module, SmoaLayer):
        block_ranks = module.adapters[adapter].ranks
        if module.adapters[adapter].modulation == "none":
            return sum(block_ranks)
        return rank_bound(module.out_features, module.in_features, block_ranks)
    ranks = getattr(module, "r", None)
    is_scaled = getattr(module, "use_dora", {}).get(adapter)  # DoRA's magnitudes change W itself
    return int(ranks[adapter]) if isinstance(ranks, dict) and hasattr(module, "lora_A") and not is_scaled else None


def rank_bound(out_features: int, in_features: int, ranks: Sequence[int]) -> int:
    """Upper bound of rank ΔW, by the ranks r_k of the blocks, if all anchors have full rank:
    `Σ_k min(|I_k|, |J_k|, r_k·min(|I_k|, |J_k|))`."""
    rows, columns = block_sizes(out_features, len(ranks)), block_sizes(in_features, len(ranks))
    return sum(min(m, n) if rank else 0 for m, n, rank in zip(rows, columns, ranks, strict=True))


def spectral_figures(weight: Tensor, delta_weight: Tensor) -> dict[str, Any]:
    """The figures of a :class:`LayerReport` that come from the spectra of W and ΔW, both (out_features, in_features).
    These are decomposed in full, in float32 or wider."""
    W, delta = (
        matrix.detach().to(decomposition_device(matrix.device)).to(torch.promote_types(matrix.dtype, torch.float32))
        for matrix in (weight, delta_weight)
    )
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    values, of_weight = torch.linalg.svdvals(delta).double().cpu(), sigma.double().cpu()
    energy = _shares(delta @ Vh.T) + _shares(delta.T @ U)
    largest = float(values[0])
    return {
        "relative_update": float(values.norm() / of_weight.norm()),
        "relative_spectral_norm": largest / float(of_weight[0]),
        "rank": int((values > largest * len(values) * torch.finfo(torch.float32).eps).sum()),
        "stable_rank": float((values / largest).square().sum()) if largest else 0.0,
        "coverage": float(energy @ torch.arange(len(energy), dtype=energy.dtype)) / len(energy) / 2,
        "update_values": values,
    }


def _shares(parts: Tensor) -> Tensor:
    """The share of the energy that each column has; 0 for each if there is none."""
    energy = parts.square().sum(0).double().cpu()
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)


def layer_table(reports: Sequence[LayerReport]) -> Table:
    """A row for each layer."""
    header = ["layer", "shape", "parameters", "‖ΔW‖/‖W‖", "‖ΔW‖₂/‖W‖₂", "rank", "bound", "stable rank", "coverage"]
    rows = [
        [
            report.module,
            f"{report.rows}×{report.columns}",
            f"{report.parameters:,}",
            *(report.marked(figure) for figure in TOO_FAR),
            report.rank,
            "–" if report.rank_bound is None else report.rank_bound,
            f"{report.stable_rank:.1f}",
            f"{report.coverage:.3f}",
        ]
        for report in reports
    ]
    return Table(header, rows)


def moved(adapters: Mapping[str, Sequence[LayerReport]]) -> Any:
    """How far each layer was moved: a panel for each kind of module, such as q_proj, and a line for each adapter by
    name."""
    rows = []
    for name, reports in adapters.items():
        for report in reports:
            number = re.search(r"\.(\d+)\.", f".{report.module}.")
            kind, far = report.module.rpartition(".")[2], report.relative_spectral_norm
            rows.append({"adapter": name, "layer": int(number[1]) if number else 0, "kind": kind, "moved": far})
    methods = {name: reports[0].method for name, reports in adapters.items()}
    legend = LINE_LEGEND if len(adapters) > 1 else None
    panels = [
        alt.Chart(values(row for row in rows if row["kind"] == kind))
        .mark_line(strokeWidth=1.5, point=True)
        .encode(
            x=alt.X("layer:Q", axis=alt.Axis(format="d", tickMinStep=1, grid=False)),
            y=alt.Y("moved:Q", title=None, axis=alt.Axis(tickCount=4)),
            color=colors(methods, "adapter", legend),
            strokeDash=dashes(methods, "adapter", legend),
        )
        .properties(width=PANEL, height=PANEL * 0.8, title=kind)
        for kind in dict.fromkeys(row["kind"] for row in rows)
    ]
    return alt.concat(*panels, columns=COLUMNS, title=f"‖ΔW‖₂ / ‖W‖₂ by layer; from {FAR} on much is likely forgotten")
