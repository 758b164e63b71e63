"""What methods do to the model before and after training: CorDA, and LoRA without its intruder dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoa.errors import ConfigError
from smoa_lab.base_models import empty_model
from smoa_lab.config.methods import PRESETS
from smoa_lab.config.run import ModelSection
from smoa_lab.data.rows import question
from smoa_lab.inspect import adapted_layers
from smoa_lab.study.sequence import weight_changes
from smoa_lab.training.adapting import after_training, check_adapter, with_adapter
from tests.support import lab

TARGETS = ["q_proj"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model; passages are at hand."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    passages = [question("prose", str(i), f"Passage {i}", f"{i} " * 20) for i in range(40)]
    lab.fill_cache(tmp_path / "cache", passages[:30], passages[30:], "prose")
    return AutoModelForCausalLM.from_pretrained(lab.tiny_base(tmp_path / "base"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 30)[None]).logits
    return found


def test_corda_splits_the_least_used_directions_off_and_changes_no_output(base: Any, tmp_path: Path) -> None:
    before = logits(base)
    weight = base.model.layers[0].self_attn.q_proj.weight.clone()
    model = with_adapter(base, lab.byte_tokenizer(), "corda", {"r": 2, "lora_alpha": 2, "target_modules": TARGETS})
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    residual = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.linalg.matrix_rank(weight - residual, rtol=1e-3) == 2
    untrained = weight_changes(model, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert untrained is not None
    assert untrained["relative_norm"]["max"] < 1e-5


def test_corda_reads_no_more_of_a_passage_than_the_model_takes(base: Any) -> None:
    lengths: set[int] = set()

    def note(module: Any, given: Any, options: dict[str, Tensor]) -> None:
        lengths.add(options["input_ids"].shape[1])

    base.config.max_position_embeddings = 20
    with base.base_model.register_forward_pre_hook(note, with_kwargs=True):
        with_adapter(base, lab.byte_tokenizer(), "corda", {"r": 2, "lora_alpha": 2, "target_modules": TARGETS})
    assert lengths == {20}


def test_corda_without_named_layers_is_refused(base: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: is missing; corda measures"):
        with_adapter(base, lab.byte_tokenizer(), "corda", {"r": 2})


@pytest.fixture
def empty(tmp_path: Path) -> Any:
    """A tiny model without weights."""
    return empty_model(ModelSection(name=str(lab.tiny_base(tmp_path / "base"))))


@pytest.mark.parametrize("method", ["smoa", "lora"])
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"adapter\.target_modules: the model has no layer 'q_prj'; did you mean 'q_proj'",
        ),
        ({"target_modules": ["q_proj", "v_prj"]}, "no layer 'v_prj'; did you mean 'v_proj'"),
        ({"target_modules": "q_proj"}, r"'q_proj' would have to match a whole path; write \[q_proj\] for a name"),
        ({"target_modules": []}, "adapter: No `target_modules` passed"),
        ({"target_modules": ".*nowhere"}, "adapter: Target modules .*nowhere not found"),
        ({"target_modules": ["mlp"]}, "adapter: .*LlamaMLP"),
        ({"target_modules": "all-linear", "exclude_modules": ".*"}, "adapter: All modules were excluded"),
        ({"target_modules": TARGETS, "modules_to_save": ["lm_hed"]}, r"modules_to_save: .*did you mean 'lm_head'"),
        ({"target_modules": TARGETS, "layers_to_transform": [9]}, "adapter: Target modules .*layers_to_transform"),
        ({"target_modules": TARGETS, "inference_mode": True}, "adapter: trains nothing; leave inference_mode out"),
        (
            {"target_modules": TARGETS, "trainable_token_indices": [3, 259]},
            r"adapter\.trainable_token_indices: there is no token 259; the embeddings have rows 0 to 258",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_without_its_weights(
    method: str, adapter: dict[str, Any], message: str, empty: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_adapter(empty, method, adapter)


@pytest.mark.parametrize(
    ("method", "adapter", "message"),
    [
        ("ia3", {"target_modules": TARGETS}, "`feedforward_modules` should be a subset .* as ia3 completes the keys"),
        ("vera", {"target_modules": TARGETS, "r": 0}, "adapter: float division by zero"),
        ("trainable_tokens", {"token_indices": [-1]}, r"adapter\.token_indices: there is no token -1"),
    ],
)
def test_what_other_methods_would_fail_at_after_training_is_refused(
    method: str, adapter: dict[str, Any], message: str, empty: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_adapter(empty, method, adapter)


@pytest.mark.parametrize("method", PRESETS)
def test_an_adapter_of_each_preset_that_fits_is_taken(method: str, empty: Any) -> None:
    check_adapter(empty, method, {} if method == "full" else {"target_modules": ["self_attn.q_proj"]})
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda'")
def test_what_peft_refuses_only_with_the_weights_is_an_error_of_the_adapter_too(base: Any) -> None:
    adapter = {"init_lora_weights": "corda", "target_modules": TARGETS}
    with pytest.raises(ConfigError, match="adapter: `eigens` attribute not found"):
        with_adapter(base, lab.byte_tokenizer(), "lora", adapter)


def updates(model: PeftModel) -> list[Tensor]:
    return [layer.get_delta_weight("default").detach().clone() for _, layer in adapted_layers(model)]


def intruding(base: Any) -> PeftModel:
    """A LoRA whose update is far larger than W, in a direction of its own."""
    model: Any = get_peft_model(base, LoraConfig(r=1, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False))
    for _, layer in adapted_layers(model):
        layer.lora_B["default"].weight.data.mul_(30)
    return model  # type: ignore[no-any-return]


def test_intruders_are_scaled_down_in_the_adapter_that_was_trained(base: Any) -> None:
    model = intruding(base)
    before = updates(model)
    after_training(model, "lora-reduced")
    assert list(model.peft_config) == [model.active_adapter] == ["default"]
    for old, new in zip(before, updates(model), strict=True):
        assert torch.linalg.matrix_norm(new - 0.75 * old) < 0.05 * torch.linalg.matrix_norm(old)


def test_an_update_without_intruders_stays(base: Any) -> None:
    model: Any = get_peft_model(base, LoraConfig(r=1, target_modules=TARGETS, init_lora_weights=False))
    for _, layer in adapted_layers(model):
        layer.lora_B["default"].weight.data.mul_(1e-3)
    before = logits(model)
    after_training(model, "lora-reduced")
    torch.testing.assert_close(logits(model), before)
