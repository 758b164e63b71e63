from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from smoa import ConfigError, MergeError, SmoaConfig
from smoa.hotswap import hotswap_adapter
from smoa.kept import snapshot_of
from tests.support import tiny
from tests.support.layers import assert_close, layers_of
from tests.support.tiny import logits, with_settings

# The spectral partition depends on the weights alone; another one shows that the labels are swapped too.
SLOT = {"r": 6, "num_blocks": 3, "alpha": 12.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def adapted(seed: int, family: str = "llama", **config: Any) -> PeftModel:
    torch.manual_seed(seed)
    options = SLOT | {"init_weights": False, "task_type": "CAUSAL_LM"} | config
    return get_peft_model(tiny.build(family), SmoaConfig(**options)).eval()


def saved(folder: Path, seed: int = 2, family: str = "llama", **config: Any) -> PeftModel:
    model = adapted(seed, family, **config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "smoa_" not in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "other",
    [
        {"partition": "random", "r": 4, "alpha": 5.0},
        {"r": 3, "alpha": None},
        {"r": 2},
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 1.0}},
        {"target_modules": ["q_proj"]},
        {"smoa_dropout": 0.5},
    ],
)
def test_after_a_swap_the_model_does_what_the_new_adapter_does(other: dict[str, Any], tmp_path: Path) -> None:
    """Also once it was saved and loaded, and swapped back it is what it was; another adapter stays as it is."""
    saved(tmp_path / "first", seed=1)
    model, new = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "first"), saved(tmp_path, **other)
    model.add_adapter("other", SmoaConfig(**SLOT | {"init_weights": False, "task_type": "CAUSAL_LM"}))
    before = logits(model.eval())
    assert not torch.allclose(before, logits(new), atol=1e-3)
    dropout = {type(layer.smoa_dropout["default"]) for layer in layers_of(model)}
    hotswap_adapter(model, tmp_path)
    assert_close(logits(model), logits(new))
    assert {type(layer.smoa_dropout["default"]) for layer in layers_of(model)} == dropout
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "again")
    assert again.peft_config["default"].r == SLOT["r"]
    assert_close(logits(again.eval()), logits(new))
    hotswap_adapter(model, tmp_path, "other")
    hotswap_adapter(model, tmp_path / "first")
    assert torch.equal(logits(model), before)
    model.set_adapter("other")
    assert_close(logits(model), logits(new))


def test_the_config_says_of_its_base_what_the_file_says(tmp_path: Path) -> None:
    saved(tmp_path)
    said = {"scale": "lora", "other_base": True}
    with_settings(tmp_path, **said)
    model = adapted(1)
    hotswap_adapter(model, tmp_path)
    assert {key: getattr(model.peft_config["default"], key) for key in said} == said


def test_a_scale_that_was_set_goes_on_acting(tmp_path: Path) -> None:
    model, new = adapted(1), saved(tmp_path, r=3, alpha=2.0)
    for one in (model, new):
        for layer in layers_of(one):
            layer.set_scale("default", 0.5)
    hotswap_adapter(model, tmp_path)
    assert_close(logits(model), logits(new))


@pytest.mark.parametrize(("file", "slot"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_file_of_a_narrow_dtype_is_scaled_in_the_dtype_of_the_slot(
    file: torch.dtype, slot: torch.dtype, tmp_path: Path
) -> None:
    def linear(alpha: float, dtype: torch.dtype) -> PeftModel:
        torch.manual_seed(0)
        config = SmoaConfig(r=4, num_blocks=2, alpha=alpha, target_modules=["0"], init_weights=False)
        return get_peft_model(nn.Sequential(nn.Linear(24, 18)).to(dtype), config, autocast_adapter_dtype=False)

    linear(7.0, file).save_pretrained(tmp_path)
    loaded, swapped = linear(7.0, slot), linear(3.0, slot)
    loaded.load_adapter(tmp_path, "default", autocast_adapter_dtype=False)
    hotswap_adapter(swapped, tmp_path)
    (expected,), (found,) = ([layer.delta("default") for layer in layers_of(model)] for model in (loaded, swapped))
    assert_close(found, expected)


def test_modules_and_biases_that_were_trained_besides_are_swapped(tmp_path: Path) -> None:
    besides = {"target_modules": ["c_attn"], "bias": "smoa_only", "modules_to_save": ["ln_f"]}
    model, new = adapted(1, "gpt2", **besides), saved(tmp_path, family="gpt2", **besides)
    hotswap_adapter(model, tmp_path)
    assert_close(logits(model, "gpt2"), logits(new, "gpt2"))


@pytest.mark.slow  # compiles twelve layers
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    model = adapted(1)
    new = saved(tmp_path, partition="random", r=3, alpha=1.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(compiled, tmp_path)
        assert_close(logits(compiled), logits(new))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_generate_has_the_new_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    new = saved(tmp_path).to(dtype)
    with torch.inference_mode():
        model = adapted(1).to(dtype)  # its tensors have no version counter
        with snapshot_of(layers_of(model)):
            logits(model)
        hotswap_adapter(model, tmp_path)
        with snapshot_of([*layers_of(model), *layers_of(new)]):
            assert_close(logits(model), logits(new))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"r": 9}, "more than the"),
        ({"num_blocks": 2}, "differs from the loaded adapter in num_blocks"),
        ({"modulation": "none"}, "modulation"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"has .*k_proj, which 'default' lacks"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(other: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = adapted(1)
    saved(tmp_path, **other)
    before = logits(model)
    with pytest.raises(ConfigError, match=reason):
        hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_a_merged_adapter_is_not_swapped(tmp_path: Path) -> None:
    model = saved(tmp_path)
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        hotswap_adapter(model, tmp_path)


def test_only_smoa_adapters_are_swapped(tmp_path: Path) -> None:
    lora = get_peft_model(tiny.build("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="both must be SMoA adapters"):
        hotswap_adapter(lora, tmp_path)
    with pytest.raises(ConfigError, match="can't replace 'other'"):
        hotswap_adapter(adapted(1), tmp_path, "other")
    with pytest.raises(ConfigError, match="both must be SMoA adapters"):
        hotswap_adapter(adapted(1), tmp_path)


def test_an_adapter_whose_name_begins_like_the_slots_is_left_alone(tmp_path: Path) -> None:
    new, model = saved(tmp_path), adapted(1)
    model.add_adapter("default_too", SmoaConfig(**SLOT | {"target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}))
    hotswap_adapter(model, tmp_path)
    assert_close(logits(model), logits(new))
