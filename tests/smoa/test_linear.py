"""Every route through the layer gives the oracle's values and gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests import oracle
from tests.support.layers import (
    adapted_layer,
    assert_close,
    assert_path,
    base_layer,
    base_weight,
    clone_leaf,
    factors,
    inputs,
    layer_13_to_11,
    oracle_delta,
    oracle_gradients,
    oracle_output,
    own_gradients,
)

pytestmark = pytest.mark.usefixtures("pieces")
whole_runs = pytest.mark.parametrize("pieces", ["whole"], indirect=True)  # compiled code cuts none

MODULATIONS = ["hadamard", "none"]


def test_a_compiled_model_forms_the_weight_in_training_and_not_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted_layer(base_layer(13, 11), r=4, num_blocks=2), torch.randn(1, 11, dtype=torch.float64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.fits_one_product(x, "default")
    with torch.no_grad():
        assert not layer.fits_one_product(x, "default")


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=["1-D", "2-D", "4-D"])
@pytest.mark.parametrize(
    ("route", "modulation"), [("one product", "hadamard"), ("apart", "hadamard"), ("apart", "none")]
)
def test_inputs_of_one_to_four_dimensions(shape: tuple[int, ...], modulation: str, route: str) -> None:
    layer = layer_13_to_11(modulation=modulation, route=route)
    x = inputs(*shape)
    y = layer(x)
    assert y.shape == (*shape, 11)
    assert_path(layer, y, x)


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("shape", [(3, 0)])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(shape: tuple[int, ...], modulation: str) -> None:
    layer = layer_13_to_11(modulation=modulation)
    x = inputs(*shape)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape, 11)
    assert x.grad.shape == x.shape
    assert all((factor.grad == 0).all() for factor in factors(layer))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_inputs_that_are_not_contiguous(modulation: str) -> None:
    layer = layer_13_to_11(modulation=modulation)
    x = torch.randn(13, 6, 4, dtype=torch.float64).permute(2, 1, 0)[:, ::2].requires_grad_()
    assert not x.is_contiguous()
    assert_path(layer, layer(x), x)
    gradient = torch.randn(4, 11, 3, dtype=torch.float64).mT  # nor are gradients
    expected = oracle_gradients(layer, x, gradient)
    for own, oracles in zip(own_gradients(layer, layer(x), x, gradient), expected, strict=True):
        assert_close(own, oracles)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize(
    ("route", "modulation"), [("one product", "hadamard"), ("apart", "hadamard"), ("apart", "none")]
)
def test_whatever_is_frozen_the_others_get_their_gradients(
    frozen: tuple[int, ...], route: str, modulation: str
) -> None:
    """Of x, A and B."""
    layer = layer_13_to_11(modulation=modulation, route=route)
    leaves = [inputs(5), *factors(layer)]
    for number in frozen:
        leaves[number].requires_grad_(False)
    y = layer(leaves[0])
    y.sum().backward()
    expected = oracle_gradients(layer, leaves[0], torch.ones_like(y))[1:]
    for number, (leaf, oracles) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is None) == (number in frozen)
        if number not in frozen:
            assert_close(leaf.grad, oracles)


@pytest.mark.parametrize(("modulation", "conv1d"), [("hadamard", False), ("hadamard", True), ("none", False)])
def test_a_trained_base_weight_gets_its_gradient(modulation: str, conv1d: bool) -> None:
    layer = layer_13_to_11(conv1d=conv1d, modulation=modulation)
    weight = layer.get_base_layer().weight.requires_grad_()
    x, gradient = torch.randn(5, 13, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    layer(x).backward(gradient)
    W = clone_leaf(base_weight(layer))
    oracle.forward(x, W, None, [oracle_delta(layer, weight=W)]).backward(gradient)
    assert_close(weight.grad.T if conv1d else weight.grad, W.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["fast", "dropout"])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool, dropout: float) -> None:
    layer = layer_13_to_11(smoa_dropout=dropout).train()
    x, gradient = inputs(5), torch.randn(5, 11, dtype=torch.float64)
    torch.manual_seed(1)
    plain = own_gradients(layer, layer(x), x, gradient)
    torch.manual_seed(1)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.backward(gradient)
    checkpointed = [y.detach(), x.grad, *(factor.grad for factor in factors(layer))]
    for first, second in zip(checkpointed, plain, strict=True):
        assert_close(first, second)


@pytest.mark.parametrize(("dtype", "modulation"), [(torch.float32, "hadamard"), (torch.bfloat16, "none")])
def test_autocast_to_bf16_stays_close_to_the_oracle(dtype: torch.dtype, modulation: str) -> None:
    layer = layer_13_to_11(dtype=dtype, modulation=modulation)
    for factor in factors(layer):
        factor.data = factor.data.float()
    x = inputs(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    gradient = torch.randn_like(y)
    assert y.dtype == torch.bfloat16
    expected = oracle_gradients(layer, x, gradient)
    for own, oracles in zip(own_gradients(layer, y, x, gradient), expected, strict=True):
        assert (own.double() - oracles).norm() <= 0.02 * oracles.norm()


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize(("tokens", "context"), [(1, torch.no_grad), (200, torch.inference_mode)])
def test_without_gradients_the_output_is_the_oracles(tokens: int, context: type, modulation: str) -> None:
    layer = layer_13_to_11(modulation=modulation)
    x = torch.randn(tokens, 13, dtype=torch.float64)
    with context():
        y = layer(x)
    assert not y.requires_grad
    assert_close(y, oracle_output(layer, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_trains_after_inference_mode(dtype: torch.dtype) -> None:
    layer = layer_13_to_11(dtype=dtype)
    x = inputs(200, dtype=dtype)

    def infer_then_train() -> Tensor:
        with torch.inference_mode():
            expected = layer(x)
        y = layer(x)
        y.sum().backward()
        assert_close(y, expected.clone())
        return y

    # a thread of its own, so that nothing that earlier tests left behind is reused
    with ThreadPoolExecutor(1) as pool:
        pool.submit(infer_then_train).result()


@whole_runs
def test_a_compiled_layer_drops_the_same_inputs() -> None:
    torch.compiler.reset()
    layer = layer_13_to_11(smoa_dropout=0.5).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, gradient = inputs(2, 5), torch.randn(2, 5, 11, dtype=torch.float64)
    found = []
    for form in (layer, compiled):
        torch.manual_seed(3)
        found.append(own_gradients(layer, form(x), x, gradient))
    for plain, own in zip(*found, strict=True):
        assert_close(own, plain)


@whole_runs
@pytest.mark.parametrize(("route", "modulation"), [("one product", "hadamard"), ("apart", "none")])
def test_a_compiled_layer_of_changing_batch_size_is_the_oracles(route: str, modulation: str) -> None:
    torch.compiler.reset()
    layer = layer_13_to_11(conv1d=route == "one product", modulation=modulation, route=route)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x = inputs(tokens)
        assert_path(layer, compiled(x), x)


@whole_runs
@pytest.mark.parametrize(("gradients", "strict"), [(False, False), (True, False), (True, True)])
def test_it_is_exported_with_a_dynamic_batch(gradients: bool, strict: bool) -> None:
    layer, x = adapted_layer(base_layer(12, 14, dtype=torch.float32)), torch.randn(9, 14)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.set_grad_enabled(gradients):
        shapes = ({0: batch},)
        exported = torch.export.export(layer, (torch.randn(4, 14),), dynamic_shapes=shapes, strict=strict)
        assert_close(exported.module()(x), layer(x))


def test_a_hook_of_all_modules_sees_the_base_layer() -> None:
    layer, seen = adapted_layer(base_layer(16, 16, dtype=torch.float32), num_blocks=2), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(512, 16))
    finally:
        handle.remove()
    assert layer.base_layer in seen


@whole_runs
def test_random_factors_make_an_update_of_a_tenth_of_the_weight_in_its_blocks() -> None:
    layer = adapted_layer(base_layer(256, 192), trained=False, r=16, num_blocks=4, alpha=5.0, init_weights=False)
    with torch.no_grad():
        update, weight = (layer.blocks("default").of(matrix) for matrix in (layer.delta("default"), base_weight(layer)))
    sizes = [torch.cat([block.flatten() for block in blocks]).square().mean().sqrt() for blocks in (update, weight)]
    assert 0.07 < float(sizes[0] / sizes[1]) < 0.14
