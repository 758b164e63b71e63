"""`smoa inspect`: what is reported of every layer, and the picture."""

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
from smoa_lab import inspect
from smoa_lab.inspect import LayerReport, adapted_layers, inspect_layers, moved, spectral_figures, weights_and_updates
from tests.support import lab, tiny
from tests.support.layers import Wrapper
from tests.support.tiny import EXPERTS, build, matrix_of, wrappers

TARGETS = ["q_proj", "v_proj"]


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
    model = get_peft_model(tiny.build("llama"), config)
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
        values = torch.linalg.svdvals(module.get_delta_weight("default").double())
        largest = torch.linalg.matrix_norm(module.base_layer.weight.double(), 2)
        assert layer.relative_spectral_norm == pytest.approx(float(values[0] / largest), rel=1e-4)
        assert layer.stable_rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-4)
        far = [getattr(layer, name) > limit for name, limit in limits.items()]
        assert layer.to_dict()["moved_too_far"] is any(far)
        assert [layer.marked(name).startswith("! ") for name in limits] == far
    assert {layer.moved_too_far for layer in layers} == {True, False}


@pytest.mark.parametrize(
    ("norms", "far"),
    [
        ((0.059, 0.1), [False, False]),
        ((0.061, 0.1), [True, False]),
        ((0.05, 0.199), [False, False]),
        ((0.05, 0.201), [False, True]),
    ],
)
def test_a_layer_is_far_from_a_norm_of_006_or_a_spectral_norm_of_02_on(
    smoa: tuple[list[LayerReport], Any], norms: tuple[float, float], far: list[bool]
) -> None:
    """As docs/cli.md says."""
    names = ("relative_update", "relative_spectral_norm")
    layer = dataclasses.replace(smoa[0][0], **dict(zip(names, norms, strict=True)))
    assert [layer.marked(name).startswith("! ") for name in names] == far
    assert layer.moved_too_far is any(far)


def test_a_lora_is_reported_by_its_rank_and_without_blocks(lora: list[LayerReport]) -> None:
    assert [layer.method for layer in lora] == ["lora"] * 4
    assert [layer.rank for layer in lora] == [layer.rank_bound for layer in lora] == [3] * 4
    assert all(layer.parameters == 3 * (layer.rows + layer.columns) for layer in lora)
    assert lora[0].block_scales == ()


def test_every_expert_is_reported_by_itself(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build("qwen3_moe").save_pretrained(base)
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
    build("gpt_oss" if is_transposed else "qwen3_moe").save_pretrained(base)
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


def test_the_picture_has_a_panel_for_each_kind_of_module_and_a_line_for_each_adapter(
    smoa: tuple[list[LayerReport], Any], lora: list[LayerReport]
) -> None:
    drawn = moved({"ours": smoa[0], "theirs": lora}).to_dict()
    assert [panel["title"] for panel in drawn["concat"]] == TARGETS
    rows = [row for own in drawn["datasets"].values() for row in own]
    assert {(row["adapter"], row["layer"]) for row in rows} == {("ours", 0), ("ours", 1), ("theirs", 0), ("theirs", 1)}
    assert {row["moved"] for row in rows} == {layer.relative_spectral_norm for layer in (*smoa[0], *lora)}


# spectra


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 7, dtype=torch.float64)


def test_an_update_along_one_direction_has_all_its_energy_there(weight: torch.Tensor) -> None:
    U, values, Vh = torch.linalg.svd(weight, full_matrices=False)
    found = spectral_figures(weight, 0.5 * torch.outer(U[:, 2], Vh[2]))
    assert (found["rank"], found["stable_rank"]) == (1, pytest.approx(1))
    assert found["coverage"] == pytest.approx(2 / 7)
    assert found["relative_spectral_norm"] == pytest.approx(0.5 / float(values[0]))


def test_an_update_of_zero_has_no_rank_and_no_coverage(weight: torch.Tensor) -> None:
    found = spectral_figures(weight, torch.zeros_like(weight))
    assert found.pop("update_values").tolist() == [0.0] * 7
    assert set(found.values()) == {0}
