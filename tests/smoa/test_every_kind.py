"""What layers of every kind have in common: merging, several adapters, mixed batches, dropout, saved files."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.autograd.functional import jacobian, jvp
from torch.func import functional_call, vmap

from smoa import MergeError, SmoaConfig
from smoa.hotswap import hotswap_adapter
from smoa.layer import SmoaLayer
from tests import oracle
from tests.support.layers import (
    KINDS,
    ROUTES,
    Wrapper,
    adapted_layer,
    assert_close,
    base_weight,
    factors,
    input_of,
    kind_of_layer,
    labels,
    oracle_of,
    randomise,
)
from tests.support.watch import NoDecomposition

SETTINGS = {"r": 7, "num_blocks": 3, "alpha": 4.0, "target_modules": ["layer"]}
every_kind = pytest.mark.parametrize("kind", KINDS)


def two_adapters(kind: str, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, SmoaLayer]:
    model = get_peft_model(Wrapper(kind_of_layer(kind, dtype)), SmoaConfig(**SETTINGS), "one")
    model.add_adapter("two", SmoaConfig(**SETTINGS | {"r": 5, "num_blocks": 2}))
    layer = model.base_model.model.layer
    for name in ("one", "two"):
        randomise(layer, name)
    return model.eval(), layer


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")  # PEFT's own
@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_kind
def test_the_merged_weight_is_the_oracles_and_unmerging_restores_every_bit(kind: str, dtype: torch.dtype) -> None:
    model, layer = two_adapters(kind, dtype)
    weight, x = layer.get_base_layer().weight, input_of(kind, dtype)
    before, expected, delta = weight.clone(), oracle_of(layer, x, "one", "two"), layer.delta("one")
    model.base_model.set_adapter(["one", "two"])
    assert_close(layer(x), expected)
    for order in ([["one", "two"], ["two"]], [["two"], ["one"]]):  # together, again, and one after the other
        for names in order:
            model.merge_adapter(names, safe_merge=True)
        assert_close(layer.get_base_layer()(x), expected)
        assert_close(layer.delta("one"), delta)  # of the pristine weight
        assert sorted(layer.merged_adapters) == ["one", "two"]
        model.unmerge_adapter()
        assert torch.equal(weight, before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert torch.equal(weight, before)
    layer.smoa_A["one"].weight.data.fill_(float("nan"))
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weight, before)


@every_kind
def test_each_sample_of_a_mixed_batch_gets_its_adapter(kind: str) -> None:
    model, layer = two_adapters(kind)
    x = input_of(kind)
    mixed = model(torch.cat([x, x]), adapter_names=["one", "two", "__base__", "one"])
    model.set_adapter("one")
    assert_close(mixed[[0, 3]], layer(x))
    assert_close(mixed[1], oracle_of(layer, x[1:], "two")[0])
    assert_close(mixed[2], layer.get_base_layer()(x[:1])[0])


@every_kind
def test_dropout_acts_in_training_only(kind: str) -> None:
    base, x = kind_of_layer(kind), input_of(kind)
    before = base(x)
    layer = adapted_layer(base, trained=False, smoa_dropout=0.5, r=7, num_blocks=3)
    assert_close(layer(x), before)  # a new adapter changes nothing
    assert labels(layer) == oracle.spectral_labels(base_weight(layer), 3)
    randomise(layer)
    torch.manual_seed(1)
    trained = layer.train()(x)
    assert not torch.allclose(trained, layer.eval()(x))
    assert_close(layer(x), oracle_of(layer, x))


@every_kind
def test_a_saved_adapter_loads_to_the_same_output_without_a_decomposition(kind: str, tmp_path: Path) -> None:
    base = kind_of_layer(kind, torch.float32)
    model = get_peft_model(Wrapper(base), SmoaConfig(**SETTINGS))
    randomise(model.base_model.model.layer)
    x = input_of(kind, torch.float32)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = kind_of_layer(kind, torch.float32)
    fresh.load_state_dict(base.state_dict())
    with NoDecomposition():
        loaded = PeftModel.from_pretrained(Wrapper(fresh), tmp_path)
    assert torch.equal(loaded(x), expected)
    own = loaded.base_model.model.layer
    loaded.add_adapter("two", SmoaConfig(**SETTINGS | {"r": 6}))
    randomise(own, "two")
    loaded.base_model.add_weighted_adapter(["default", "two"], [0.5, -2.0], "sum")
    assert_close(own.delta("sum"), 0.5 * own.delta("default") - 2 * own.delta("two"))
    randomise(own)
    hotswap_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), expected)
    assert len(model.base_model.model.layer.state_dict()) == 5 + len(base.state_dict())


@every_kind
def test_autocast_stays_close_to_the_oracle(kind: str) -> None:
    layer = adapted_layer(kind_of_layer(kind, torch.float32), r=7, num_blocks=3)
    x = input_of(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert_close(y, oracle_of(layer, x), dtype=torch.bfloat16)


@every_kind
def test_a_merge_under_autocast_writes_the_same_weight(kind: str) -> None:
    model, layer = two_adapters(kind, torch.float32)
    model.base_model.set_adapter(["one", "two"])
    found = []
    for casts in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            model.merge_adapter()
            found.append((layer.get_base_layer().weight.clone(), layer.get_delta_weight("one")))
            model.unmerge_adapter()
    assert all(map(torch.equal, *found))


# transforms: what LoRA's layers can do


def ensemble(kind: str) -> list[SmoaLayer]:
    """Adapters of the same blocks: those of other ones are not seen in a functional call."""
    base = kind_of_layer(kind)
    return [adapted_layer(copy.deepcopy(base), r=7, num_blocks=3) for _ in range(2)]


@every_kind
def test_vmap_takes_a_whole_ensemble_and_leaves_nothing_of_it_behind(kind: str) -> None:
    layers, x = ensemble(kind), input_of(kind)
    base = copy.deepcopy(layers[0])
    states = [layer.state_dict() for layer in layers]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    found = vmap(lambda state: functional_call(base, state, (x,)))(stacked)
    for own, layer in zip(found, layers, strict=True):
        assert_close(own, layer(x))
    assert torch.equal(base(x), layers[0](x))


@every_kind
@pytest.mark.parametrize("route", ROUTES)
def test_batched_gradients_are_the_single_ones(kind: str, route: str) -> None:
    layer, x = adapted_layer(kind_of_layer(kind), r=7, num_blocks=3, route=route), input_of(kind)
    inputs = [*factors(layer), *([x.requires_grad_()] if x.is_floating_point() else [])]
    y = layer(x).flatten()[:5]
    batched = torch.autograd.grad(y, inputs, torch.eye(5, dtype=y.dtype), is_grads_batched=True, retain_graph=True)
    for i in range(5):
        single = torch.autograd.grad(y[i], inputs, retain_graph=True)
        for own, expected in zip(batched, single, strict=True):
            assert_close(own[i], expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own forward mode uses it
def test_vectorized_jacobians_and_products_with_them_are_the_plain_ones(kind: str, route: str) -> None:
    layer, x = adapted_layer(kind_of_layer(kind), r=7, num_blocks=3, route=route), input_of(kind)[:1]
    expected = jacobian(layer, x)
    assert_close(jacobian(layer, x, vectorize=True), expected)
    assert_close(jacobian(layer, x, vectorize=True, strategy="forward-mode"), expected)
    direction = torch.randn_like(x)
    _, product = jvp(layer, x, direction)  # differentiates twice
    assert_close(product, torch.tensordot(expected, direction, x.dim()))


@every_kind
@pytest.mark.parametrize("route", ROUTES[:1])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_traced_layer_takes_other_batches(kind: str, route: str) -> None:
    layer, x = adapted_layer(kind_of_layer(kind), r=7, num_blocks=3, route=route), input_of(kind)
    traced = torch.jit.trace(layer, (x[:1],))
    assert_close(traced(x), layer(x))
