"""`smoa inspect`: what is reported of every layer, and the page with its charts."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smoa import SmoaConfig
from smoa.errors import MergeError
from smoa.partition import Blocks
from smoa.spectrum import spectral_scores
from smoa_lab import inspect
from smoa_lab.inspect import LayerReport, adapted_layers, inspect_layers, update_spectrum, weights_and_updates
from smoa_lab.inspect_page import POINTS, coverage, inspection_page, spectrum
from smoa_lab.pages.charts import MUTED, color_of
from tests.support import lab, tiny_models
from tests.support.layers import Wrapper
from tests.support.tiny_mixtures import EXPERTS, build_mixture, matrix_of, wrappers

TARGETS = ["q_proj", "v_proj"]
SIZE = 500


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.tiny_base(tmp_path_factory.mktemp("base"))


def reports(base: Path, config: PeftConfig) -> tuple[list[LayerReport], PeftModel]:
    """What `smoa inspect` finds in an adapter of random factors, and the adapted model."""
    adapter = base / str(config.peft_type.value)
    model: Any = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter)
    return inspect_layers(adapter), model.requires_grad_(False)


def smoa_config(**options: Any) -> SmoaConfig:
    return SmoaConfig(**{"r": 4, "num_blocks": 2, "target_modules": TARGETS, "init_weights": False, **options})


@pytest.fixture(scope="module")
def smoa(base: Path) -> tuple[list[LayerReport], PeftModel]:
    torch.manual_seed(0)
    return reports(base, smoa_config(scale="block"))


@pytest.fixture(scope="module")
def lora(base: Path) -> list[LayerReport]:
    return reports(base, LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))[0]


OPTIONS = {"r": 3, "target_modules": ["q_proj"]}
CONFIGS = {
    "lora": LoraConfig(**OPTIONS, lora_alpha=7),
    "dora": LoraConfig(**OPTIONS, use_dora=True),
    "smoa": SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}
if hasattr(peft, "HiraConfig"):  # from PEFT 0.20 on
    CONFIGS["hira"] = peft.HiraConfig(**OPTIONS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weight_and_update_add_up_to_the_merged_weight(config: PeftConfig) -> None:
    model = get_peft_model(tiny_models.build("llama"), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_(std=0.3)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_modules())
    layers = list(adapted_layers(model.base_model.model))
    assert layers
    for path, layer in layers:
        [(name, weight, update)] = weights_and_updates(path, layer, "default")
        assert name == path
        assert torch.equal(weight, layer.get_base_layer().weight)
        assert update.norm() > 0
        torch.testing.assert_close(weight + update, merged[path].weight)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of norms
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("LNTuningConfig", "ln_tuning changes no weight matrix"),
        ("LilyConfig", "q_proj: ΔW is what a merge adds, and PEFT can't merge this method"),
    ],
)
def test_what_has_no_matrix_to_show_is_one_error(base: Path, config: str, message: str) -> None:
    if not hasattr(peft, config):
        pytest.skip("not in this PEFT")
    with pytest.raises(MergeError, match=message):
        reports(base, getattr(peft, config)(**{} if config == "LNTuningConfig" else {"target_modules": TARGETS}))


@pytest.mark.parametrize(
    "config",
    [
        peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=8, target_modules=TARGETS),
        peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=TARGETS),
    ],
    ids=["vblora", "adalora"],
)
def test_what_layers_share_counts_once_and_what_does_not_train_counts_nowhere(base: Path, config: PeftConfig) -> None:
    trained = get_peft_model(LlamaForCausalLM.from_pretrained(base), copy.copy(config)).get_nb_trainable_parameters()[0]
    assert sum(report.parameters for report in reports(base, config)[0]) == trained


@pytest.mark.parametrize("config", [SmoaConfig, LoraConfig])
def test_the_update_of_a_convolution_is_a_matrix(config: type) -> None:
    options = {"init_weights": False} if config is SmoaConfig else {"init_lora_weights": False}
    model = get_peft_model(Wrapper(nn.Conv2d(4, 6, 3)), config(r=4, target_modules=["layer"], **options))
    [(name, weight, update)] = weights_and_updates("layer", model.base_model.model.layer, "default")
    assert name == "layer"
    assert weight.shape == update.shape == (6, 4 * 9)
    expected = model.base_model.model.layer.get_delta_weight("default").flatten(1)
    assert torch.allclose(update, expected, atol=1e-5)


def test_without_modulation_the_rank_is_bound_by_r_unless_the_whole_weight_is_scaled(base: Path) -> None:
    layers, _ = reports(base, smoa_config(modulation="none", partition="contiguous"))
    assert {layer.rank_bound for layer in layers} == {4}
    assert all(layer.rank <= 4 for layer in layers)
    layers, _ = reports(base, LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, use_dora=True))
    assert {layer.rank_bound for layer in layers} == {None}


def test_spectra_and_scales_are_the_updates_own_and_far_layers_are_marked(
    smoa: tuple[list[LayerReport], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, model = smoa
    limits = {
        name: sorted(getattr(layer, name) for layer in layers)[1]
        for name in ("relative_update", "relative_spectral_norm")
    }
    monkeypatch.setattr(inspect, "TOO_FAR", limits)
    for layer in layers:
        module = model.base_model.model.get_submodule(layer.module)
        blocks = module.blocks("default").of(module.base_layer.weight.detach())
        scales = [module.scaling["default"] / float(block.square().mean().sqrt()) for block in blocks]
        assert list(layer.block_scales) == pytest.approx(scales, rel=1e-5)
        assert len(layer.bands) == len(layer.to_dict()["block_coverages"]) == 2
        scores = spectral_scores(module.base_layer.weight.detach())
        for block, band in enumerate(layer.bands):
            labels = (module.blocks("default").row_labels, module.blocks("default").col_labels)
            own = torch.cat([of_side[label == block] for of_side, label in zip(scores, labels, strict=True)])
            assert band == pytest.approx((float(own.min()), float(own.max())), rel=1e-4)
        values = torch.linalg.svdvals(module.get_delta_weight("default").double())
        largest = torch.linalg.matrix_norm(module.base_layer.weight.double(), 2)
        assert layer.relative_spectral_norm == pytest.approx(float(values[0] / largest), rel=1e-4)
        assert layer.stable_rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-4)
        far = [getattr(layer, name) > limit for name, limit in limits.items()]
        assert layer.to_dict()["moved_too_far"] is any(far)
        assert [layer.marked(name).startswith("! ") for name in limits] == far
    assert {layer.moved_too_far for layer in layers} == {True, False}


@pytest.mark.parametrize(
    ("update", "far"),
    [
        (0.059 * torch.ones(100), [False, False]),
        (0.061 * torch.ones(100), [True, False]),
        (0.199 * torch.eye(100)[0], [False, False]),
        (0.201 * torch.eye(100)[0], [False, True]),
    ],
)
def test_a_layer_is_far_from_a_norm_of_006_or_a_spectral_norm_of_02_on(
    smoa: tuple[list[LayerReport], Any], update: torch.Tensor, far: list[bool]
) -> None:
    """As docs/cli.md says."""
    layer = dataclasses.replace(smoa[0][0], weight_values=torch.ones(100), update_values=update)
    assert [layer.marked(name).startswith("! ") for name in ("relative_update", "relative_spectral_norm")] == far
    assert layer.moved_too_far is any(far)


def test_a_lora_is_reported_by_its_rank_and_without_blocks(lora: list[LayerReport]) -> None:
    assert [layer.method for layer in lora] == ["lora"] * 4
    assert [layer.rank for layer in lora] == [layer.rank_bound for layer in lora] == [3] * 4
    assert all(layer.parameters == 3 * (layer.rows + layer.columns) for layer in lora)
    assert (lora[0].bands, lora[0].block_scales, lora[0].block_coverages) == ((), (), ())
    assert "block_scales" not in lora[0].to_dict()
    page = inspection_page("A LoRA", {"lora": lora})
    assert page.count("<figure data-chart>") == 4
    assert "Block by block" not in page
    assert "spectral scores" not in page


def test_every_expert_is_reported_by_itself(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build_mixture("qwen3_moe").save_pretrained(base)
    config = smoa_config(target_modules=[], target_parameters=EXPERTS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter)
    lab.byte_tokenizer().save_pretrained(base)
    layers = inspect_layers(adapter, str(base))
    assert len(layers) == 15
    expert = next(layer for layer in layers if layer.module == "model.layers.0.mlp.experts.gate_up_proj[3].1")
    wrapper = wrappers(model)["gate_up_proj"]
    delta = wrapper.delta("default")[3, 1].detach().double()
    assert expert.relative_update == pytest.approx(float(delta.norm() / matrix_of(wrapper, 3, 1).norm()), rel=1e-4)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_experts_of_a_lora_are_reported_too(is_transposed: bool, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build_mixture("gpt_oss" if is_transposed else "qwen3_moe").save_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    experts = model.model.layers[0].mlp.experts
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS, init_lora_weights=False)
    before = {name: getattr(experts, name).detach().clone() for name in ("gate_up_proj", "down_proj")}
    model = get_peft_model(model, config)
    model.save_pretrained(adapter)
    shown = {layer.module: layer for layer in inspect_layers(adapter, str(base)) if ".layers.0.mlp" in layer.module}
    merged = model.merge_and_unload().model.layers[0].mlp.experts
    assert len(shown) == 2 * len(before["down_proj"])
    for name, weight in before.items():
        delta = (
            (getattr(merged, name).detach() - weight)[1].mT if is_transposed else (getattr(merged, name) - weight)[1]
        )
        found = shown[f"model.layers.0.mlp.experts.{name}[1]"]
        assert (found.rows, found.columns, found.rank_bound) == (*delta.shape, 2)
        assert found.rank == 2
        assert found.relative_update == pytest.approx(float(delta.norm() / weight[1].norm()), rel=1e-4)


def test_what_is_trained_beside_matrices_is_named(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    reports(base, smoa_config(bias="all"))
    assert "what it trained by bias is not shown" in caplog.text


def test_two_adapters_stand_beside_each_other_and_the_first_is_shown_in_detail(
    smoa: tuple[list[LayerReport], Any], lora: list[LayerReport]
) -> None:
    ours, _ = smoa
    page = inspection_page("Two", {"ours": ours, "theirs": lora})
    changed = max(ours, key=lambda layer: layer.relative_update)
    assert f"<h2>What changed most: {changed.module}</h2>" in page
    assert page.count("<figure data-chart>") == 5
    assert "<h2>Block by block</h2>" in page
    for name in ("ours", "theirs"):
        assert f"Every adapted layer of {name}" in page
    mean = sum(layer.coverage for layer in lora) / 4
    assert f"theirs: mean coverage {mean:.3f}, mean rank 3, {sum(x.parameters for x in lora):,} trained" in page


def report(method: str = "smoa", blocks: int = 2) -> LayerReport:
    """A layer of which only the leading half is changed."""
    energy = torch.cat([torch.ones(SIZE // 2), torch.zeros(SIZE // 2)]).double() * 2 / SIZE
    values = torch.linspace(1, 0, SIZE).double()
    of_blocks = energy.expand(blocks, SIZE) if blocks else None
    numbers: dict[str, Any] = dict.fromkeys(("rows", "columns", "parameters", "rank_bound"), 8)
    return LayerReport(
        *(values, values / 10, energy, energy, of_blocks, ((1.0, 5.0),) * blocks),
        module="model.layers.3.q_proj",
        method=method,
        block_scales=tuple(2.0**k for k in range(blocks)),
        **numbers,
    )


def drawn_rows(chart: Any) -> list[list[dict[str, Any]]]:
    return list(chart.to_dict()["datasets"].values())


def test_the_coverage_rises_to_one_where_the_energy_ends() -> None:
    (curve,) = [rows for rows in drawn_rows(coverage({"ours": [report(), report()]})) if "adapter" in rows[0]]
    at = {row["part"]: row["share"] for row in curve}
    assert (at[0.0], at[0.25], at[0.5], at[1.0]) == pytest.approx((0, 0.5, 1, 1))


def test_a_long_spectrum_is_drawn_by_some_of_its_values_with_a_bar_for_each_block() -> None:
    drawn = spectrum(report(blocks=3), color_of("smoa")).to_dict()
    assert {len(rows) for rows in drawn["datasets"].values()} == {POINTS, 3}
    assert {layer["layer"][0]["mark"]["color"] for layer in drawn["vconcat"][0]["layer"]} == {MUTED, color_of("smoa")}
    nothing = torch.zeros(SIZE).double()
    flat = dict.fromkeys(("update_values", "input_energy", "output_energy"), nothing)
    assert drawn_rows(spectrum(dataclasses.replace(report(blocks=0), **flat), MUTED))


# spectra


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 7, dtype=torch.float64)


def test_an_update_along_one_direction_has_all_its_energy_there(weight: torch.Tensor) -> None:
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    found = update_spectrum(weight, 0.5 * torch.outer(U[:, 2], Vh[2]))
    assert found.rank == 1
    assert found.effective_rank == pytest.approx(1.0)
    assert found.coverage == pytest.approx(2 / 7)
    assert found.input_energy[2] == pytest.approx(1.0)
    assert found.output_energy[2] == pytest.approx(1.0)


def test_an_update_of_zero_has_no_rank_and_no_coverage(weight: torch.Tensor) -> None:
    found = update_spectrum(weight, torch.zeros_like(weight))
    assert (found.rank, found.effective_rank, found.coverage) == (0, 0.0, 0.0)
    assert (found.relative_spectral_norm, found.stable_rank) == (0, 0)


def test_the_coverage_of_a_block_is_that_of_its_part_of_the_update(weight: torch.Tensor) -> None:
    rows, cols = (torch.tensor(labels, dtype=torch.uint8) for labels in ([0, 1, 2] * 4, [2, 0, 1, 0, 1, 2, 0]))
    blocks = Blocks(rows, cols, 3)
    delta = torch.zeros_like(weight)
    for k in range(3):
        inside = torch.outer(blocks.row_labels == k, blocks.col_labels == k)
        delta[inside] = torch.randn(int(inside.sum()), dtype=weight.dtype)
    found = update_spectrum(weight, delta, blocks)
    for k, share in enumerate(found.block_coverages):
        alone = torch.where(torch.outer(blocks.row_labels == k, blocks.col_labels == k), delta, 0)
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        energy = (alone @ Vh.T).square().sum(0) + (U.T @ alone).square().sum(1)
        place = torch.arange(7, dtype=weight.dtype) / 7
        assert share == pytest.approx(float((energy * place).sum() / energy.sum()))
    assert update_spectrum(weight, delta).block_coverages == ()
