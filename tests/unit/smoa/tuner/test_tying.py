"""Layers of one weight: adapters that older versions trained with `ensure_weight_tying`, and adapters of one end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from smoa import ConfigError, MergeError, SmoaConfig
from smoa.hotswap import hotswap_adapter
from tests.support import golden, tiny_models
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
TIED = Path(__file__).parents[3] / "golden" / "adapters" / "tied"


def tied(low_cpu_mem_usage: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(golden.base("gemma3"), TIED, low_cpu_mem_usage=low_cpu_mem_usage).eval()


def adapted(target: str | list[str] = "lm_head", family: str = "gemma3", **settings: Any) -> PeftModel:
    options: dict[str, Any] = {"r": 7, "num_blocks": 3, "alpha": 4.0, "init_weights": False}
    targets = [target] if isinstance(target, str) else target
    return get_peft_model(
        tiny_models.build(family), SmoaConfig(**options | {"target_modules": targets} | settings)
    ).eval()


def effective_weights(model: nn.Module) -> list[Tensor]:
    ends = {name: layer for name, layer in smoa_layers(model).items() if name.endswith(tuple(ENDS))}
    return [layer.pristine_weight() + layer.delta("default") for layer in ends.values()]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_tied_adapter_is_loaded_and_saved_with_all_ends(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = tied(low_cpu_mem_usage)
    first, second = effective_weights(model)
    assert torch.equal(first, second)
    model.save_pretrained(tmp_path)
    saved, known = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, TIED))
    assert saved.keys() >= known.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in known.items() if ".smoa_" in key)
    assert model.get_input_embeddings().get_base_layer().weight is model.get_output_embeddings().get_base_layer().weight


def test_a_merge_leaves_the_ends_tied_and_unmerging_restores_every_bit(tmp_path: Path) -> None:
    model, before = tied(), golden.base("gemma3").state_dict()
    expected = logits(model, "gemma3")
    model.merge_adapter(safe_merge=True)
    assert_close(logits(model, "gemma3"), expected)
    model.unmerge_adapter()
    assert all(
        torch.equal(layer.stored_weight(), before[f"{name}.weight"]) for name, layer in smoa_layers(model).items()
    )
    assert torch.equal(logits(model, "gemma3"), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged, "gemma3"), expected)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert_close(logits(type(merged).from_pretrained(tmp_path).eval(), "gemma3"), expected)


def test_each_end_with_an_adapter_of_its_own_is_not_merged() -> None:
    model = adapted(ENDS)
    first, second = effective_weights(model)
    assert not torch.allclose(first, second)
    with pytest.warns(UserWarning, match="ensure_weight_tying has no effect: no target shares its weight"):
        adapted("q_proj", ensure_weight_tying=True)
    with pytest.raises(MergeError, match=r"lm_head and model\.embed_tokens share one weight"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning")
@pytest.mark.parametrize("assign", [False, True])
def test_an_adapter_of_one_end_is_merged_into_a_weight_of_its_own(assign: bool) -> None:
    model = adapted("embed_tokens")
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


def bart() -> Any:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes))


def bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=64, **sizes))


def test_a_weight_to_which_several_are_tied_is_not_merged_into_a_model_to_be_saved() -> None:
    model = get_peft_model(bart(), SmoaConfig(r=2, num_blocks=2, target_modules=["shared"], init_weights=False))
    with pytest.raises(MergeError, match=r"model\.shared: .*lm_head.* are tied to its weight.*adapt one of these"):
        model.merge_and_unload()
    model.merge_adapter()
    model.unmerge_adapter()


@pytest.mark.parametrize(("build", "head"), [(bart, "lm_head"), (bert, "decoder")])
def test_a_model_with_a_merged_head_keeps_what_else_is_tied_when_it_is_saved(
    build: Callable[[], Any], head: str, tmp_path: Path
) -> None:
    base, ids = build().eval(), torch.arange(2, 12)[None]
    nn.init.normal_(base.get_output_embeddings().weight)
    if (bias := base.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    config = SmoaConfig(r=4, num_blocks=2, target_modules=[head], init_weights=False)
    with pytest.warns(UserWarning, match="the merged end has a weight of its own"):
        model = get_peft_model(base, config).merge_and_unload()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    own, tied = (each.weight.data_ptr() for each in (loaded.get_output_embeddings(), loaded.get_input_embeddings()))
    assert own != tied


def test_a_sum_of_tied_adapters_is_a_new_one_and_refused() -> None:
    model = tied()
    model.load_adapter(TIED, "second")
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    assert {*model.peft_config} == {"default", "second"}


def test_a_tied_adapter_is_swapped_for_a_tied_one_alone(tmp_path: Path) -> None:
    model = tied()
    tied().save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / "adapter_model.safetensors"
    halved = {key: tensor / 2 if ".smoa_B." in key else tensor for key, tensor in load_file(file).items()}
    save_file(halved, file, {"format": "pt"})
    hotswap_adapter(model, tmp_path / "tied")
    expected = PeftModel.from_pretrained(golden.base("gemma3"), tmp_path / "tied").eval()
    assert torch.equal(logits(model, "gemma3"), logits(expected, "gemma3"))
    options: dict[str, Any] = {"r": 6, "num_blocks": 3, "alpha": 9, "init_weights": False}
    untied = SmoaConfig(**options, target_modules=[*ENDS, "q_proj"])
    get_peft_model(golden.base("gemma3"), untied).save_pretrained(tmp_path / "untied")
    with pytest.raises(ConfigError, match="has ensure_weight_tying=False, not True"):
        hotswap_adapter(model, tmp_path / "untied")
