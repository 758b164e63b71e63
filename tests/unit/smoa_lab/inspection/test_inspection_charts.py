"""The charts of `smoa inspect`, by the data that they draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smoa.maths.analysis import UpdateSpectrum
from smoa_lab.drawing.look import MUTED, PALETTE, specification
from smoa_lab.inspection.inspection_charts import POINTS, by_block, by_layer, coverage, place, spectrum
from smoa_lab.inspection.layer_reports import LayerReport

SIZE = 500


def report(module: str = "model.layers.3.q_proj", method: str = "smoa", blocks: int = 2) -> LayerReport:
    """A layer of which only the leading half is changed."""
    energy = torch.cat([torch.ones(SIZE // 2), torch.zeros(SIZE // 2)]).double() * 2 / SIZE
    values = torch.linspace(1, 0, SIZE).double()
    found = UpdateSpectrum(values, values / 10, energy, energy, energy.expand(blocks, SIZE) if blocks else None)
    numbers: dict[str, Any] = dict.fromkeys(("rows", "columns", "parameters", "rank", "rank_bound"), 8)
    numbers |= dict.fromkeys(("relative_update", "relative_spectral_norm", "effective_rank", "stable_rank"), 0.5)
    by_block = {"bands": ((1.0, 5.0),) * blocks, "block_scales": tuple(2.0**k for k in range(blocks))}
    return LayerReport(module=module, method=method, coverage=0.25, spectrum=found, **numbers, **by_block)


def rows(chart: Any) -> list[list[dict[str, Any]]]:
    return list(specification(chart)["datasets"].values())


def test_layers_are_placed_by_their_number_and_kind() -> None:
    assert place("model.layers.12.self_attn.q_proj") == {"layer": 12, "kind": "q_proj"}
    assert place("classifier") == {"layer": 0, "kind": "classifier"}


def test_every_kind_of_module_has_a_panel_with_a_line_for_each_adapter() -> None:
    found = [
        {"adapter": adapter, "module": f"layers.{layer}.{kind}", "size": 0.1}
        for adapter in ("ours", "theirs")
        for layer in (0, 1)
        for kind in ("q_proj", "up_proj")
    ]
    drawn = specification(by_layer(found, {"ours": "smoa", "theirs": "lora"}, "size", "Size"))
    assert [panel["title"] for panel in drawn["concat"]] == ["q_proj", "up_proj"]
    scale = drawn["concat"][0]["layer"][0]["encoding"]["color"]["scale"]
    assert scale == {"domain": ["ours", "theirs"], "range": [PALETTE["smoa"], PALETTE["lora"]]}


def test_blocks_have_their_coverage_and_scale() -> None:
    (found,) = rows(by_block({"ours": [report()], "theirs": [report(method="lora", blocks=0)]}))
    assert [(one["adapter"], one["block"], one["scale"]) for one in found] == [("ours", 1, 1.0), ("ours", 2, 2.0)]
    assert all(one["coverage"] == pytest.approx(0.25, abs=1e-2) for one in found)
    assert by_block({"theirs": [report(method="lora", blocks=0)]}) is None


def test_the_coverage_rises_to_one_where_the_energy_ends() -> None:
    (found,) = [one for one in rows(coverage({"ours": [report(), report()]})) if "adapter" in one[0]]
    at = {one["part"]: one["share"] for one in found}
    assert (at[0.0], at[0.25], at[0.5], at[1.0]) == pytest.approx((0, 0.5, 1, 1))


def test_a_long_spectrum_is_drawn_by_some_of_its_values_with_a_bar_for_each_block() -> None:
    drawn = specification(spectrum(report(blocks=3), PALETTE["smoa"]))
    sizes = {len(one) for one in drawn["datasets"].values()}
    assert sizes == {POINTS, 3}
    colors = {layer["layer"][0]["mark"]["color"] for layer in drawn["vconcat"][0]["layer"]}
    assert colors == {MUTED, PALETTE["smoa"]}


def test_an_update_of_zero_is_drawn() -> None:
    nothing = torch.zeros(SIZE).double()
    found = UpdateSpectrum(torch.ones(SIZE).double(), nothing, nothing, nothing)
    layer = LayerReport(*("layer", "lora", 8, 8, 8), 0.0, 0.0, 0, None, 0.0, 0.0, 0.0, found)
    assert rows(spectrum(layer, MUTED))
