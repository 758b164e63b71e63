"""Every kernel gives the oracle's values and gradients, keeps nothing of a weight's size, and shares no memory."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from smoa.layers.kept import snapshot_of
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import Blocks
from smoa.maths.factors import Factors, saved_shapes
from smoa.maths.kernels.blocks import SCRATCH, Branch, block_deltas, plain_branch, product_dtype
from smoa.maths.kernels.one_product import OneProduct
from smoa.maths.spectrum import make_partition
from tests import reference
from tests.support.gradients import assert_layer_is_the_oracles
from tests.support.layers import ROUTES, adapted_layer, base_layer, factors, oracle_output
from tests.support.live_bytes import LiveBytes
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, Problem, problem


def operands(case: Problem) -> tuple[list[float], Tensor, Tensor]:
    """A scale for each block, x and the gradient g of an output."""
    out_features, in_features = case.weight.shape
    x = torch.randn(5, in_features, dtype=torch.float64, requires_grad=True)
    return [1.0 + k for k in range(len(case.ranks))], x, torch.randn(5, out_features, dtype=torch.float64)


def assert_all_close(found: Any, expected: Any) -> None:
    for own, theirs in zip(found, expected, strict=True):
        assert_close(own, theirs)


# values and gradients


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("kind", "transposed"), [("spectral", False), ("contiguous", True), ("spectral", True)])
@pytest.mark.parametrize("sizes", CASES)
def test_values_gradients_and_blocks_are_the_oracles(
    sizes: tuple[int, int, tuple[int, ...]], transposed: bool, kind: str
) -> None:
    case = problem(*sizes, kind)
    scale, x, g = operands(case)
    delta = case.oracle("hadamard", [0.5 * s for s in scale])
    expected = torch.autograd.grad(x @ delta.T, (x, case.A, case.B), g)
    weight = case.weight.T.contiguous().T if transposed else case.weight
    forward, backward = Branch().forward, Branch().backward
    with torch.no_grad():
        assert_close(forward(case.factors(0.5, scale), x, weight), x @ delta.T)
        assert_all_close(backward(case.factors(0.5, scale), g, x, weight, True), expected)
        grad_x, *of_factors = backward(case.factors(0.5, scale), g, x, weight, False)
        kept = block_deltas(case.factors(0.5, scale), weight, torch.float64)
        assert_all_close([block for _, stacked in kept for block in stacked], case.partition.of(delta))
    assert grad_x.numel() == 0
    assert_all_close(of_factors, expected[1:])


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("sizes", CASES)
def test_one_products_values_and_gradients_are_those_of_the_sum_of_weight_and_update(
    sizes: tuple[int, int, tuple[int, ...]], transposed: bool
) -> None:
    case = problem(*sizes)
    scale, x, g = operands(case)
    bias = torch.randn(case.weight.shape[0], dtype=torch.float64)
    weight = case.weight.T.contiguous().T if transposed else case.weight
    y, route = x @ (case.weight + case.oracle("hadamard", [0.5 * s for s in scale])).T, OneProduct(transposed)
    expected = torch.autograd.grad(y, (x, case.A, case.B), g)
    with torch.no_grad():
        assert_close(route.forward(case.factors(0.5, scale), x, weight, None), y)
        assert_close(route.forward(case.factors(0.5, scale), x, weight, bias), y + bias)
        of_all = route.backward(case.factors(0.5, scale), g, x, weight, True)
        no_x, *of_factors = route.backward(case.factors(0.5, scale), g, x, weight, False)
    assert_all_close(of_all, expected)
    assert_all_close(of_factors, expected[1:])
    assert no_x is None


@pytest.mark.parametrize("anchored", [True, False], ids=["anchor", "none"])
@pytest.mark.parametrize("sizes", CASES)
def test_the_plain_branch_is_the_oracles_with_an_anchor_and_without(
    sizes: tuple[int, int, tuple[int, ...]], anchored: bool
) -> None:
    case = problem(*sizes)
    scale, x, g = operands(case)
    leaves = [case.A, case.B, *([case.weight.requires_grad_()] if anchored else [])]
    y = plain_branch(case.factors(0.5, scale), x[None], case.weight if anchored else None)[0]
    expected = x @ case.oracle("hadamard" if anchored else "none", [0.5 * s for s in scale]).T
    assert_close(y, expected)
    assert_all_close(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g))
    assert plain_branch(case.factors(), x.float(), case.weight).dtype == torch.float32


@pytest.mark.usefixtures("pieces")
@torch.no_grad()
def test_padding_has_no_effect_and_gets_no_gradient() -> None:
    case, forward, backward = problem(11, 13, (2, 2, 2)), Branch().forward, Branch().backward
    in_A, in_B = reference.real_entries(11, 13, case.ranks)
    _, x, g = operands(case)
    before = forward(case.factors(), x, case.weight)
    case.A[~in_A], case.B[~in_B] = 1e6, 1e6
    assert torch.equal(forward(case.factors(), x, case.weight), before)
    _, grad_A, grad_B = backward(case.factors(), g, x, case.weight, False)
    assert (grad_A[~in_A] == 0).all()
    assert (grad_B[~in_B] == 0).all()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "spectral"), (torch.float16, "contiguous")])
@torch.no_grad()
def test_half_precision_rounds_the_update_once(dtype: torch.dtype, kind: str) -> None:
    case, forward, backward = problem(11, 13, (1, 4, 2), kind), Branch().forward, Branch().backward
    single = case._replace(A=case.A.detach().float(), B=case.B.detach().float(), weight=case.weight.to(dtype))
    given, x, g = single.factors(0.5), torch.randn(5, 13).to(dtype), torch.randn(5, 11).to(dtype)
    y, (grad_x, grad_A, grad_B) = forward(given, x, single.weight), backward(given, g, x, single.weight, True)
    assert [tensor.dtype for tensor in (y, grad_x, grad_A, grad_B)] == [dtype, dtype, torch.float32, torch.float32]
    delta = single.double().oracle("hadamard", 0.5)
    assert_close(y, x.double() @ delta.T)
    assert_close(grad_x, g.double() @ delta)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("route", "conv1d"), [("one product", True), ("apart", False)])
@pytest.mark.parametrize(("r", "num_blocks"), [(7, 1), (7, 3), (110, 3)])
def test_whole_and_cut_runs_of_rows_give_the_oracles_values_and_gradients(
    r: int, num_blocks: int, route: str, conv1d: bool
) -> None:
    assert_layer_is_the_oracles(r=r, num_blocks=num_blocks, alpha=3.0, route=route, conv1d=conv1d)


# which kernel is taken


# memory


def test_threads_and_calls_share_no_memory() -> None:
    layers = [adapted_layer(base_layer(150, 120), r=8, num_blocks=2) for _ in range(4)]
    inputs = [torch.randn(70, 120, dtype=torch.float64) for _ in layers]

    def repeat(i: int) -> bool:
        with torch.no_grad():
            first = layers[i](inputs[i])
            return all(torch.equal(layers[i](inputs[i]), first) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))
    y = layers[0](inputs[0])
    layers[0](inputs[1]).sum().backward()
    assert_close(y, oracle_output(layers[0], inputs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
def test_a_call_with_fake_tensors_changes_nothing_for_later_ones(route: str, dtype: torch.dtype) -> None:
    layer = adapted_layer(base_layer(150, 120, dtype=dtype), r=8, num_blocks=2, route=route)
    x = torch.randn(7, 120, dtype=dtype)
    with torch.no_grad(), snapshot_of([layer]):
        expected = layer(x)
        copied = copy.deepcopy(layer)
        SCRATCH.buffers.clear()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, snapshot_of([copied]):
            for fake in (mode.from_tensor(x), x):
                assert layer(fake).shape == copied(fake).shape == (7, 150)
        assert torch.equal(layer(x), expected)
    assert torch.equal(copied(x), layer(x))
    assert not any(isinstance(tensor, FakeTensor) for tensor in [*SCRATCH.buffers.values(), *copied.buffers()])


@pytest.mark.parametrize(("num_blocks", "kind"), [(2, "random"), (8, "contiguous"), (8, "random")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_holds_at_most_three_times_the_diagonal_blocks(dtype: torch.dtype, num_blocks: int, kind: str) -> None:
    weight = torch.randn(512, 768).to(dtype)  # beside which the factors and two tokens are small
    A, B = (torch.randn(shape) for shape in saved_shapes((512, 768), (1,) * num_blocks)[:2])
    blocks: Blocks = make_partition(weight, num_blocks, kind)  # type: ignore[arg-type]
    given = Factors(A, B, (1,) * num_blocks, 1.0, torch.ones(num_blocks), blocks)
    x, g = torch.randn(2, 768).to(dtype), torch.randn(2, 512).to(dtype)
    Branch().backward(given, g, x, weight, True)  # makes the buffers that a CPU keeps
    known = x, g, weight, A, B, given.rank_scale, *blocks.orders, *SCRATCH.buffers.values()
    with LiveBytes(*known) as forward:
        Branch().forward(given, x, weight)
    with LiveBytes(*known) as backward:
        Branch().backward(given, g, x, weight, True)
    small = 4 * (A.nbytes + B.nbytes) + 3 * (x.nbytes + g.nbytes)
    for peak in (forward.peak, backward.peak):
        assert weight.nbytes / num_blocks < peak <= 3 / num_blocks * weight.nbytes + small


def kept_for_backward(layer: SmoaLayer, x: Tensor) -> list[Tensor]:
    """Tensors that autograd keeps from the forward, without the frozen parameters themselves."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    frozen = {p.untyped_storage().data_ptr() for p in layer.get_base_layer().parameters()}
    return [t for t in kept if t.untyped_storage().data_ptr() not in frozen]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("dtype", "conv1d", "dropout", "modulation"),
    [
        (torch.float32, False, 0.0, "hadamard"),
        (torch.float32, True, 0.1, "hadamard"),
        (torch.bfloat16, False, 0.1, "hadamard"),
        (torch.bfloat16, True, 0.0, "hadamard"),
        (torch.float32, True, 0.0, "none"),
        (torch.bfloat16, False, 0.1, "none"),
    ],
)
def test_nothing_of_the_weights_size_is_kept_for_the_backward(
    dtype: torch.dtype, conv1d: bool, dropout: float, modulation: str
) -> None:
    base = base_layer(96, 80, conv1d=conv1d, dtype=dtype)
    layer = adapted_layer(base, r=4, num_blocks=2, smoa_dropout=dropout, modulation=modulation).train()
    x = torch.randn(3, 80, dtype=dtype, requires_grad=True)
    largest = max(factor.numel() for factor in factors(layer)) + x.numel()
    assert 0 < max(t.numel() for t in kept_for_backward(layer, x)) <= largest
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert max(t.numel() for t in kept_for_backward(layer, x.detach().float().requires_grad_())) <= largest


# transforms


def test_a_pytorch_without_onednn_trains_and_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch.ops.__dict__, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer = adapted_layer(base_layer(8, 8, dtype=torch.bfloat16), r=4, num_blocks=2)
    layer(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert all(factor.grad.any() for factor in factors(layer))
    assert product_dtype(torch.bfloat16, "cpu") == torch.float32
