from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations import moe

from smoa.errors import UnsupportedModuleError
from smoa.experts import Layout
from smoa.stand_in import StandIn
from tests.support.layers import assert_close

E, M, N = 3, 4, 8
PICKED = torch.tensor([2, 0, 2, 2, 0])


def stand_in(transposed: bool = False) -> tuple[Any, Tensor]:
    """A parameter W's stand-in that adds what an update D of the same shape does, and W + D as it is stored."""
    weight = nn.Parameter(torch.randn(E, N, M) if transposed else torch.randn(E, M, N))
    update = torch.randn_like(weight)
    layout = Layout(E, 1, M, N, transposed)

    def branch(x: Tensor, ends: Tensor | int, backwards: bool) -> Tensor:
        assert not backwards
        rows = torch.arange(len(x))
        experts = torch.full_like(rows, ends) if isinstance(ends, int) else torch.bucketize(rows, ends, right=True)
        return torch.einsum("sn,snm->sm" if transposed else "sn,smn->sm", x, update[experts])

    return StandIn("down_proj", lambda: weight, layout, branch), (weight + update).detach()


PRODUCTS: dict[str, tuple[bool, Callable[[Any], Tensor]]] = {
    "linear of one expert": (False, lambda W: linear(torch.ones(2, 5, N), W[PICKED[0]])),
    "linear with a bias": (False, lambda W: linear(torch.ones(5, N), W[1], torch.ones(M))),
    "@ of one expert": (True, lambda W: torch.ones(5, N) @ W[torch.tensor(1)]),
    "@ of one expert's transpose": (False, lambda W: torch.ones(5, N) @ W[1].T),
    "matmul": (True, lambda W: torch.matmul(torch.ones(5, N), W[1])),
    "one matrix for each row": (False, lambda W: torch.bmm(W[PICKED], torch.arange(5.0 * N).view(5, N, 1))),
    "one transposed for each row": (True, lambda W: torch.bmm(torch.arange(5.0 * N).view(5, 1, N), W[PICKED])),
    "a batch for each expert": (True, lambda W: torch.bmm(torch.arange(E * 2.0 * N).view(E, 2, N), W)),
    "grouped": (
        False,
        lambda W: moe._grouped_linear(torch.arange(5.0 * N).view(5, N), W, torch.tensor([2, 2, 5]).int()),
    ),
    "grouped, transposed": (
        True,
        lambda W: moe._grouped_linear(
            torch.arange(5.0 * N).view(5, N), W, torch.tensor([2, 2, 5]).int(), is_transposed=True
        ),
    ),
    "grouped by transformers' fallback": (
        True,
        lambda W: torch.ops.transformers.grouped_mm_fallback(torch.ones(5, N), W, offs=torch.tensor([2, 2, 5])),
    ),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_that_with_the_changed_weight(product: str) -> None:
    transposed, function = PRODUCTS[product]
    own, effective = stand_in(transposed)
    assert_close(function(own), function(effective))


@pytest.mark.parametrize(
    "function",
    [
        lambda W: linear(W[1], torch.ones(3, N)),
        lambda W: torch.ones(5, M) @ W[1],  # it is (out, in)
        lambda W: torch.einsum("si,eoi->seo", torch.ones(5, N), W),
        lambda W: torch.bmm(torch.ones(E, 2, M), W),
        lambda W: torch.bmm(W[PICKED[:2]], torch.ones(2, N, 3)),
        lambda W: W.view(-1),
        lambda W: W.transpose(0, 1),
        lambda W: W[1][2],
        lambda W: W + 1,
    ],
)
def test_whatever_else_is_done_with_the_parameter_is_refused(function: Callable[[Any], Any]) -> None:
    own, _ = stand_in()
    with pytest.raises((UnsupportedModuleError, TypeError), match=r"down_proj: SMoA can't follow|unsupported operand"):
        function(own)


@pytest.mark.parametrize(
    ("function", "backwards"),
    [
        (lambda x, W: linear(x, W), False),
        (lambda x, W: x @ W.T, False),
        (lambda x, W: linear(x, W.T), True),
        (lambda x, W: x @ W, True),
    ],
)
def test_a_parameter_of_two_dimensions_is_multiplied_from_either_side(function: Any, backwards: bool) -> None:
    weight, update = torch.randn(M, N), torch.randn(M, N)

    def branch(x: Tensor, ends: Tensor | int, backwards: bool) -> Tensor:
        assert ends == 0
        return x @ (update if backwards else update.T)

    own: Any = StandIn("weight", lambda: weight, Layout(1, 1, M, N, is_stack=False), branch)
    x = torch.randn(5, M if backwards else N)
    assert_close(function(x, own), function(x, weight + update))


def test_it_looks_like_the_parameter() -> None:
    own, effective = stand_in()
    assert (own.shape, own.dtype, own.device, own.ndim) == (effective.shape, torch.float32, effective.device, 3)
    assert own.transpose(-2, -1).shape == own.mT.shape == (E, N, M)
    assert not hasattr(own, "__cuda_array_interface__")


def test_a_kernel_that_takes_the_memory_of_a_weight_elsewhere_than_on_a_cpu_is_refused() -> None:
    weight = nn.Parameter(torch.randn(E, M, N))
    for device in ("cpu", "meta"):
        own: Any = StandIn("down_proj", lambda: weight.to(device), Layout(E, 1, M, N, False), lambda *_: weight)  # noqa: B023
        if device == "cpu":
            assert own.data_ptr() == weight.data_ptr()
        else:
            with pytest.raises(UnsupportedModuleError, match=r"\.data_ptr"):
                own.data_ptr()
