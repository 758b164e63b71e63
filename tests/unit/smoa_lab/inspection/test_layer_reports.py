from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smoa import SmoaConfig
from smoa_lab.config.run import ModelSection
from smoa_lab.inspection import layer_reports
from smoa_lab.inspection.layer_reports import LayerReport, _rank_bound, inspect_layers
from smoa_lab.models.base_models import load_base_model
from smoa_lab.runs.layer_updates import weights_and_updates
from tests.support import lab, tiny_models
from tests.support.layers import Wrapper
from tests.support.tiny_mixtures import EXPERTS, build_mixture, matrix_of, wrappers

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return lab.tiny_base(tmp_path / "base")


def reports(base: Path, config: PeftConfig) -> list[LayerReport]:
    """What `smoa inspect` finds in an adapter of random factors."""
    adapter = base.with_name(str(config.peft_type.value))
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    return inspect_layers(adapter)


def smoa(base: Path, **options: object) -> list[LayerReport]:
    return reports(base, SmoaConfig(r=4, num_blocks=2, target_modules=TARGETS, init_weights=False, **options))


def test_without_modulation_the_rank_is_bound_by_r(base: Path) -> None:
    layers = smoa(base, modulation="none", partition="contiguous")
    assert {layer.rank_bound for layer in layers} == {4}
    assert all(layer.rank <= 4 for layer in layers)


def test_the_rank_of_a_lora_is_its_bound() -> None:
    model = get_peft_model(tiny_models.build("llama"), LoraConfig(r=3, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert _rank_bound(layer, "default") == 3


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_embedding_is_inspected_as_a_matrix(base: Path) -> None:
    layers = reports(base, SmoaConfig(r=4, target_modules=["embed_tokens"], init_weights=False))
    assert [(layer.module, layer.columns) for layer in layers] == [("model.embed_tokens", 32)]


@pytest.mark.parametrize("config", [SmoaConfig, LoraConfig])
def test_the_update_of_a_convolution_is_a_matrix(config: type) -> None:
    options = {"init_weights": False} if config is SmoaConfig else {"init_lora_weights": False}
    model = get_peft_model(Wrapper(nn.Conv2d(4, 6, 3)), config(r=4, target_modules=["layer"], **options))
    [(name, weight, update)] = weights_and_updates("layer", model.base_model.model.layer, "default")
    assert name == "layer"
    assert weight.shape == update.shape == (6, 4 * 9)
    expected = model.base_model.model.layer.get_delta_weight("default").flatten(1)
    assert torch.allclose(update, expected, atol=1e-5)


def test_spectral_norms_and_stable_ranks_are_the_updates_own_and_far_layers_are_marked(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"relative_update": 0.07, "relative_spectral_norm": 0.08}
    monkeypatch.setattr(layer_reports, "TOO_FAR", limits)
    config = SmoaConfig(r=4, num_blocks=2, target_modules=TARGETS, init_weights=False)
    layers = reports(base, config)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), base.with_name("SMOA"))
    for layer in layers:
        module = model.base_model.model.get_submodule(layer.module)
        values = torch.linalg.svdvals(module.get_delta_weight("default").double())
        largest = torch.linalg.matrix_norm(module.base_layer.weight.double(), 2)
        assert layer.relative_spectral_norm == pytest.approx(float(values[0] / largest), rel=1e-4)
        assert layer.stable_rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-4)
        far = [layer.relative_update > 0.07, layer.relative_spectral_norm > 0.08]
        assert layer.to_dict()["moved_too_far"] is any(far)
        assert [layer.told(figure).startswith("! ") for figure in limits] == far
    assert {layer.moved_too_far for layer in layers} == {True, False}


def test_the_base_is_loaded_in_the_revision_that_the_adapter_records(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ModelSection] = []

    def load(wanted: ModelSection) -> object:
        asked.append(wanted)
        return load_base_model(wanted)

    monkeypatch.setattr(layer_reports, "load_base_model", load)
    smoa(base, revision="v2")
    assert asked == [ModelSection(name=str(base), options={"revision": "v2"})]


def test_every_expert_is_reported_by_itself(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build_mixture("qwen3_moe").save_pretrained(base)
    config = SmoaConfig(r=4, num_blocks=2, target_modules=[], target_parameters=EXPERTS, init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter)
    lab.byte_tokenizer().save_pretrained(base)
    layers = inspect_layers(adapter, str(base))
    assert len(layers) == 15
    found = next(layer for layer in layers if layer.module == "model.layers.0.mlp.experts.gate_up_proj[3].1")
    wrapper = wrappers(model)["gate_up_proj"]
    delta = wrapper.delta("default")[3, 1].detach().double()
    assert found.relative_update == pytest.approx(float(delta.norm() / matrix_of(wrapper, 3, 1).norm()), rel=1e-4)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_block_is_told_with_its_scale_and_coverage(base: Path) -> None:
    layers = smoa(base, scale="block")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), base.with_name("SMOA"))
    for layer in layers:
        module = model.base_model.model.get_submodule(layer.module)
        blocks = module.blocks("default").of(module.base_layer.weight.detach())
        expected = [module.scaling["default"] / float(block.square().mean().sqrt()) for block in blocks]
        assert list(layer.block_scales) == pytest.approx(expected, rel=1e-5)
        assert len(layer.bands) == len(layer.to_dict()["block_coverages"]) == 2


def test_a_layer_of_another_method_has_no_blocks(base: Path) -> None:
    (first, *_) = reports(base, LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))
    assert (first.bands, first.block_scales, first.spectrum.block_coverages) == ((), (), ())
    assert "block_scales" not in first.to_dict()
