import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smoa import MergeError, SmoaConfig
from tests.support.layers import Wrapper, assert_close, base_layer, randomise


def model_with(
    first: dict[str, object], second: dict[str, object], conv1d: bool = False, out_features: int = 13
) -> PeftModel:
    def config(settings: dict[str, object]) -> SmoaConfig:
        return SmoaConfig(target_modules=["layer"], num_blocks=3, **settings)

    model = get_peft_model(Wrapper(base_layer(out_features, 11, conv1d=conv1d)), config(first), "one")
    model.add_adapter("two", config(second))
    for name in ("one", "two"):
        randomise(layer_of(model), name)
    return model


def layer_of(model: PeftModel) -> nn.Module:
    return model.base_model.model.layer


@pytest.mark.parametrize(
    ("modulation", "conv1d", "out_features", "r"),
    [("hadamard", True, 13, 8), ("none", False, 13, 8), ("hadamard", False, 2, 6)],
)
def test_concatenation_is_exact_with_any_weights(modulation: str, conv1d: bool, out_features: int, r: int) -> None:
    first, second = {"r": 5, "alpha": 7, "modulation": modulation}, {"r": 3, "modulation": modulation}
    model = model_with(first, second, conv1d, out_features)
    model.add_weighted_adapter(["one", "two"], [0.7, -1.3], "sum")
    layer = layer_of(model)
    assert_close(layer.delta("sum"), 0.7 * layer.delta("one") - 1.3 * layer.delta("two"))
    assert layer.adapters["sum"].r == r


@pytest.mark.parametrize("own", [{"alpha_pattern": {"layer": 7}}, {"use_rslora": True}, {"scale": "layer"}])
def test_concatenation_is_exact_whatever_each_is_scaled_by(own: dict[str, Any]) -> None:
    model = model_with({"r": 6, **own}, {"r": 3, **own})
    model.add_weighted_adapter(["one", "two"], [0.7, -1.3], "sum")
    layer = layer_of(model)
    assert_close(layer.delta("sum"), 0.7 * layer.delta("one") - 1.3 * layer.delta("two"))


@pytest.mark.parametrize(("combination", "normalized"), [("cat", {"scale": "layer"}), ("linear", {"scale": "block"})])
@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_an_adapter_with_normalized_anchors_combines_exactly(
    combination: str, normalized: dict[str, object], weight: float
) -> None:
    model = model_with({"r": 4} | normalized, {"r": 4})
    model.add_weighted_adapter(["one"], [weight], "scaled", combination_type=combination)
    assert model.peft_config["scaled"].scale == "paper"
    layer = layer_of(model)
    assert_close(layer.delta("scaled"), weight * layer.delta("one"))
    assert layer.adapters["scaled"].r == 4
    assert (layer.decided("one").block_scale != 1).all()
    assert (layer.decided("scaled").block_scale == 1).all()


def test_a_combined_adapter_saves_and_loads(tmp_path: object) -> None:
    model = model_with({"r": 5}, {"r": 6})
    base = copy.deepcopy(layer_of(model).get_base_layer())
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(Wrapper(base), tmp_path / "sum")  # type: ignore[operator]
    assert_close(layer_of(loaded).delta("default"), layer_of(model).delta("sum"))


@pytest.mark.parametrize(
    ("other", "arguments", "message"),
    [
        ({"r": 5}, (["one", "three"], [1.0, 1.0], "sum", "cat"), "existing adapters"),
        ({"r": 5}, (["one"], [1.0, 1.0], "sum", "cat"), "one finite weight each"),
        ({"r": 5}, (["one"], [float("nan")], "sum", "cat"), "one finite weight each"),
        ({"r": 5}, (["one"], [1.0], "two", "cat"), "a new name"),
        ({"r": 5}, (["one", "two"], [1.0, 1.0], "sum", "svd"), "combination_type='svd'"),
        ({"r": 5}, (["one", "two"], [1.0, 1.0], "sum", "linear"), "equal block ranks"),
        ({"r": 5}, (["one", "two"], [1.0, 1.0], "sum", "cat"), r"add up to \(4, 3, 2\), no even split"),
        ({"r": 3, "partition": "random"}, (["one", "two"], [1.0, 1.0], "sum", "cat"), "different partitions"),
        ({"r": 4, "rank_pattern": {"layer": 5}}, (["one", "two"], [1.0, 1.0], "sum", "cat"), "rank_pattern"),
    ],
)
def test_what_can_not_be_combined_is_refused_and_not_added(
    other: dict[str, object], arguments: tuple[Any, ...], message: str
) -> None:
    model = model_with({"r": 4}, other)
    with pytest.raises(MergeError, match=message):
        model.add_weighted_adapter(*arguments)
    assert "sum" not in model.peft_config


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_blocks": 2}, "different num_blocks"),
        *(
            ({name: value}, f"with {name}: only updates of adapted layers")
            for name, value in (
                ("bias", "smoa_only"),
                ("modules_to_save", ["head"]),
                ("trainable_token_indices", {"head": [0]}),
            )
        ),
    ],
)
def test_adapters_that_differ_or_train_more_than_layers_are_refused(settings: dict[str, object], reason: str) -> None:
    model = model_with({"r": 4}, {"r": 4})
    for name, value in settings.items():
        setattr(model.peft_config["two"], name, value)
    with pytest.raises(MergeError, match=reason):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config


def test_adapters_that_name_the_same_layers_differently_are_combined() -> None:
    model = get_peft_model(Wrapper(base_layer(13, 11)), SmoaConfig(r=4, target_modules=["layer"]), "one")
    model.add_adapter("two", SmoaConfig(r=4, target_modules="all-linear"))
    for name in ("one", "two"):
        randomise(layer_of(model), name)
    model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "sum")
    layer = layer_of(model)
    assert_close(layer.delta("sum"), layer.delta("one") + 2 * layer.delta("two"))


@pytest.mark.parametrize("lacking", [0, 1])
def test_adapters_of_different_layers_are_refused(lacking: int) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 6), "other": nn.ModuleDict({"layer": nn.Linear(6, 6)})})
    excluded = [{"exclude_modules": ["other.layer"]} if i == lacking else {} for i in range(2)]
    configs = [SmoaConfig(r=2, target_modules=["layer"], **settings) for settings in excluded]
    adapted = get_peft_model(model, configs[0], "one")
    adapted.add_adapter("two", configs[1])
    with pytest.raises(MergeError, match=r"other\.layer: (one|two) doesn't adapt this layer"):
        adapted.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert "sum" not in adapted.peft_config


def test_concatenation_is_exact_on_a_bfloat16_base() -> None:
    model = get_peft_model(Wrapper(base_layer(13, 11, dtype=torch.bfloat16)), SmoaConfig(r=4, target_modules=["layer"]))
    layer = layer_of(model)
    randomise(layer, "default")
    model.add_weighted_adapter(["default"], [0.7], "sum")
    assert layer.smoa_A["sum"].weight.dtype == torch.float32
    torch.testing.assert_close(layer.delta("sum"), 0.7 * layer.delta("default"))
