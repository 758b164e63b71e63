from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoa.layers.layer import SmoaLayer
from smoa.maths.factors import Factors
from smoa.maths.kernels import operators
from smoa.maths.spectrum import make_partition
from tests import reference
from tests.support.layers import ROUTES, Route, adapted_layer, base_layer, clone_leaf, factors, ranks

pytestmark = pytest.mark.usefixtures("kernels")

MODULATIONS = ["hadamard", "none"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_obey_the_rules_of_pytorchs_checker(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 13, dtype=dtype)
    partition = make_partition(weight, 3)
    A, B, x, g = torch.randn(6, 5), torch.randn(4, 6), torch.randn(5, 13, dtype=dtype), torch.randn(5, 11, dtype=dtype)
    fields = operators._fields(Factors(A, B, (2, 2, 2), 1.5, torch.ones(6), partition))
    torch.library.opcheck(torch.ops.smoa.hadamard_branch.default, (*fields, x, weight))
    torch.library.opcheck(torch.ops.smoa.hadamard_branch_backward.default, (*fields, g, x, weight, True))
    if dtype == torch.float32:
        torch.library.opcheck(torch.ops.smoa.fused_linear.default, (*fields, x, weight, torch.randn(11)))
        torch.library.opcheck(torch.ops.smoa.fused_linear_backward.default, (*fields, g, x, weight, True, False))


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("route", ROUTES)
def test_finite_differences_agree(route: Route, conv1d: bool, modulation: str) -> None:
    base = base_layer(7, 5, conv1d=conv1d)
    layer = adapted_layer(base, r=3, num_blocks=2, alpha=2.0, modulation=modulation, route=route)
    A, B = factors(layer)
    in_A, in_B = reference.real_entries(7, 5, ranks(layer))

    def output(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        parameters = {
            "smoa_A.default.weight": torch.zeros_like(A).masked_scatter(in_A, a),
            "smoa_B.default.weight": torch.zeros_like(B).masked_scatter(in_B, b),
            "base_layer.bias": bias,
        }
        return torch.func.functional_call(layer, parameters, (x,))

    leaves = [torch.randn(3, 5, dtype=torch.float64), A[in_A], B[in_B], base.bias]
    assert torch.autograd.gradcheck(output, [clone_leaf(leaf) for leaf in leaves])
    assert torch.autograd.gradgradcheck(output, [clone_leaf(leaf) for leaf in leaves])


def kept_for_backward(layer: SmoaLayer, x: Tensor) -> list[Tensor]:
    """Tensors that autograd keeps from the forward, without the frozen parameters themselves."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    frozen = {p.untyped_storage().data_ptr() for p in layer.get_base_layer().parameters()}
    return [t for t in kept if t.untyped_storage().data_ptr() not in frozen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fast", "dropout"])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_nothing_of_the_weights_size_is_kept_for_the_backward(
    dtype: torch.dtype, conv1d: bool, dropout: float, modulation: str
) -> None:
    base = base_layer(96, 80, conv1d=conv1d, dtype=dtype)
    layer = adapted_layer(base, r=4, num_blocks=2, smoa_dropout=dropout, modulation=modulation).train()
    x = torch.randn(3, 80, dtype=dtype, requires_grad=True)
    sizes = [t.numel() for t in kept_for_backward(layer, x)]
    assert sizes
    assert max(sizes) <= max(factor.numel() for factor in factors(layer)) + x.numel()


def test_nothing_of_the_weights_size_is_kept_for_the_backward_under_autocast() -> None:
    layer = adapted_layer(base_layer(96, 80, dtype=torch.bfloat16), r=4, num_blocks=2)
    x = torch.randn(3, 80, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        sizes = [t.numel() for t in kept_for_backward(layer, x)]
    assert max(sizes) <= max(factor.numel() for factor in factors(layer)) + x.numel()


def test_the_fast_route_keeps_the_input_the_factors_and_the_layers_own_buffers_only() -> None:
    layer = adapted_layer(base_layer(96, 80, dtype=torch.float32), r=4, num_blocks=2)
    x = torch.randn(3, 80, requires_grad=True)
    kept = {t.untyped_storage().data_ptr() for t in kept_for_backward(layer, x)}
    own = [x, *factors(layer), *layer.buffers()]
    assert kept <= {t.untyped_storage().data_ptr() for t in own}
