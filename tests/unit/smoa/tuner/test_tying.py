"""`ensure_weight_tying`: the layers of one weight get one adapter, and stay tied."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from smoa import ConfigError, MergeError, SmoaConfig
from smoa.hotswap import hotswap_adapter
from smoa.tuner.tying import tied_groups
from tests.support import tiny_models
from tests.support.layers import smoa_layers
from tests.support.tiny_models import logits
from tests.support.tolerance import assert_close

# With an embedding among its targets PEFT saves the base's embedding in the adapter too, whatever the method. Of ends
# that are not tied it warns, in other words from version to version.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
]
ENDS = ["embed_tokens", "lm_head"]
EVERY_END = {"gemma3": 2, "t5": 4, "gpt2": 2}


def adapted(target: str | list[str] = "lm_head", family: str = "gemma3", seed: int = 1, **settings: Any) -> PeftModel:
    options: dict[str, Any] = {"r": 7, "num_blocks": 3, "alpha": 4.0, "ensure_weight_tying": True}
    targets = [target] if isinstance(target, str) else target
    torch.manual_seed(seed)
    return get_peft_model(
        tiny_models.build(family),
        SmoaConfig(**options | {"target_modules": targets, "init_weights": False} | settings),
    ).eval()


def effective_weights(model: nn.Module) -> list[Tensor]:
    return [layer.pristine_weight() + layer.delta("default") for layer in smoa_layers(model).values()]


@pytest.mark.parametrize(
    ("family", "end"), [("gemma3", "embed_tokens"), ("t5", "shared"), ("t5", "lm_head"), ("gpt2", "wte")]
)
def test_whichever_end_is_named_all_layers_of_the_weight_get_one_adapter(family: str, end: str) -> None:
    model = adapted(end, family)
    first, *others = effective_weights(model)
    assert len(others) + 1 == EVERY_END[family]
    assert all(torch.equal(first, other) for other in others)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert not torch.equal(logits(model, family), logits(tiny_models.build(family), family))


def test_the_gradient_is_the_sum_of_those_of_two_equal_adapters() -> None:
    tied = adapted()
    apart = adapted(ENDS, ensure_weight_tying=False)
    for own, other in zip(smoa_layers(tied).values(), smoa_layers(apart).values(), strict=True):
        other.load_state_dict(own.state_dict())
    for model in (tied, apart):
        model(**tiny_models.batch("gemma3")).loss.backward()
    first, second = ([p.grad for p in layer.smoa_A.parameters()] for layer in smoa_layers(apart).values())
    own = next(iter(smoa_layers(tied).values())).smoa_A["default"].weight
    assert_close(own.grad, first[0] + second[0])


@pytest.mark.parametrize(("family", "low_cpu_mem_usage"), [("gemma3", True), ("t5", False), ("gpt2", False)])
def test_it_is_saved_and_loaded_with_all_ends_tied(tmp_path: Path, family: str, low_cpu_mem_usage: bool) -> None:
    model = adapted(family=family)
    model.save_pretrained(tmp_path)
    base = tiny_models.build(family)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, family), logits(model, family))
    first, *others = effective_weights(loaded)
    assert all(torch.equal(first, other) for other in others)
    assert len({id(layer.smoa_A["default"].weight) for layer in smoa_layers(loaded).values()}) == 1
    assert len({id(layer.stored_weight()) for layer in smoa_layers(loaded).values()}) == 1
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in saved if name.endswith("smoa_A.weight")]) == EVERY_END[family]


@pytest.mark.parametrize("family", EVERY_END)
def test_a_merge_leaves_the_ends_tied_and_unmerging_restores_every_bit(family: str, tmp_path: Path) -> None:
    model = adapted(family=family)
    expected, before = logits(model, family), tiny_models.build(family).state_dict()
    model.merge_adapter(safe_merge=True)
    assert_close(logits(model, family), expected)
    assert len({id(layer.stored_weight()) for layer in smoa_layers(model).values()}) == 1
    model.unmerge_adapter()
    assert all(torch.equal(layer.stored_weight(), before["lm_head.weight"]) for layer in smoa_layers(model).values())
    assert torch.equal(logits(model, family), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged, family), expected)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert_close(logits(type(merged).from_pretrained(tmp_path).eval(), family), expected)


def test_without_the_setting_each_end_has_an_adapter_and_no_merge() -> None:
    model = adapted(ENDS, ensure_weight_tying=False)
    first, second = effective_weights(model)
    assert not torch.allclose(first, second)
    with pytest.warns(UserWarning, match="ensure_weight_tying has no effect: no target shares its weight"):
        adapted("q_proj")
    with pytest.raises(MergeError, match=r"lm_head and model\.embed_tokens share one weight"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning")
@pytest.mark.parametrize("assign", [False, True])
def test_an_adapter_of_one_end_is_merged_into_a_weight_of_its_own(assign: bool) -> None:
    model = adapted("embed_tokens", ensure_weight_tying=False)
    expected = logits(model, "gemma3")
    model.merge_adapter()
    assert_close(logits(model, "gemma3"), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model, "gemma3"), expected)
    model.add_adapter("head", SmoaConfig(r=4, target_modules=["lm_head"], init_weights=False))
    model.set_adapter("head")
    model.delete_adapter("default")  # which leaves its layer
    model.load_state_dict(model.state_dict(), assign=assign)  # or two parameters in one memory
    expected = logits(model, "gemma3")
    assert_close(logits(model.merge_and_unload(), "gemma3"), expected)


def test_a_sum_of_tied_adapters_is_tied() -> None:
    model = adapted()
    model.add_adapter("second", SmoaConfig(**model.peft_config["default"].to_dict() | {"r": 6, "init_weights": False}))
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    for layer in smoa_layers(model).values():
        assert_close(layer.delta("sum"), 0.5 * layer.delta("default") - 2.0 * layer.delta("second"))


def test_an_untied_adapter_is_not_swapped_into_a_tied_one(tmp_path: Path) -> None:
    model, other = adapted(), adapted(seed=2)
    other.save_pretrained(tmp_path / "tied")
    hotswap_adapter(model, tmp_path / "tied")
    assert torch.equal(logits(model, "gemma3"), logits(other, "gemma3"))
    adapted(ENDS, ensure_weight_tying=False).save_pretrained(tmp_path / "untied")
    with pytest.raises(ConfigError, match="has ensure_weight_tying=False, not True"):
        hotswap_adapter(model, tmp_path / "untied")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exclude_modules": ["embed_tokens"]}, r"embed_tokens shares its weight with lm_head, and exclude_modules="),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save copies model\.embed_tokens, which shares .*lm_head"),
        ({"rank_pattern": {"lm_head": 3}}, r"embed_tokens and lm_head share one weight and have different settings"),
        ({"alpha_pattern": {"lm_head": 3.0}}, r"let rank_pattern, alpha_pattern and num_blocks_pattern name both"),
    ],
)
def test_what_would_untie_them_is_refused_before_anything_changes(settings: dict[str, Any], words: str) -> None:
    model = tiny_models.build("gemma3")
    kinds = [type(module) for module in model.modules()]
    config = SmoaConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True, **settings)
    with pytest.raises(ConfigError, match=words):
        get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == kinds


def test_one_embedding_in_several_places_as_after_a_resize_is_refused() -> None:
    model = tiny_models.build("t5")
    model.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(ConfigError, match=r"shared is one module at several places .*; save and load the model"):
        get_peft_model(model, SmoaConfig(r=4, target_modules=["shared"], ensure_weight_tying=True))


def test_layers_of_one_weight_are_found_before_and_after_they_are_adapted() -> None:
    assert tied_groups(tiny_models.build("gemma3")) == [["model.embed_tokens", "lm_head"]]
    assert tied_groups(adapted().base_model.model) == [["model.embed_tokens", "lm_head"]]
    assert tied_groups(tiny_models.build("llama")) == []
