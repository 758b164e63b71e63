"""The kernels as differentiable operators.

In a compiled model they are custom operators and not `torch.autograd.Function`s, because then `torch.compile` neither
breaks the graph at them nor keeps an m×n intermediate for the backward. Elsewhere they are Functions with the same
formulas, because an operator written in Python takes longer to call than a small layer's products. Gradients that are
batched, or differentiated again, are computed by PyTorch's own operations.

An operator's schema takes tensors and numbers. Only this file converts `Factors` to such fields and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks, Orders
from smoa.maths.factors import Factors
from smoa.maths.kernels.branch import branch_backward, branch_forward
from smoa.maths.kernels.fused import fused_backward, fused_forward
from smoa.maths.kernels.plain import needs_plain_gradients, plain_branch, plain_gradients

FIELDS = (
    "Tensor A, Tensor B, Tensor rank_scale, Tensor row_labels, Tensor col_labels, "
    "Tensor rows, Tensor rows_inverse, Tensor cols, Tensor cols_inverse, bool is_contiguous, int[] ranks, float scaling"
)
NUM_FIELDS = FIELDS.count(",") + 1


def _fields(factors: Factors) -> tuple[Any, ...]:
    blocks = factors.blocks
    tensors = factors.A, factors.B, factors.rank_scale, blocks.row_labels, blocks.col_labels, *blocks.orders
    return *tensors, blocks.is_contiguous, factors.ranks, factors.scaling


def _factors(fields: tuple[Any, ...]) -> Factors:
    A, B, rank_scale, row_labels, col_labels, *orders, is_contiguous, ranks, scaling = fields
    blocks = Blocks(row_labels, col_labels, len(ranks), Orders(*orders), is_contiguous)
    return Factors(A, B, tuple(ranks), scaling, rank_scale, blocks)


class Kernel:
    """A kernel that takes the fields of `Factors`, then `rest`, and the operator `smoa::name` that calls it.

    Args:
        function: The kernel, which takes `Factors`.
        output: Makes tensors of the right shapes from the operator's arguments.
    """

    def __init__(self, name: str, rest: str, function: Callable[..., Any], output: Callable[..., Any]) -> None:
        self.function = function
        schema = f"({FIELDS}, {rest}"
        self.operator: Any = torch.library.custom_op(f"smoa::{name}", self.run, mutates_args=(), schema=schema)
        self.operator.register_fake(output)

    def run(self, *inputs: Any) -> Any:
        """The result for the operator's arguments."""
        return self.of(_factors(inputs[:NUM_FIELDS]), *inputs[NUM_FIELDS:])

    def of(self, factors: Factors, *rest: Any) -> Any:
        """The result for `Factors` and what else the operator takes."""
        with torch.autocast(factors.A.device.type, enabled=False):  # the kernels choose every dtype themselves
            return self.function(factors, *rest)

    def __call__(self, *inputs: Any) -> Any:
        needs_operator = torch.compiler.is_compiling() or torch.is_grad_enabled()  # to be differentiated, or refused
        return self.operator(*inputs) if needs_operator else self.run(*inputs)


def _output_shape(*inputs: Any) -> Tensor:
    x, weight = inputs[NUM_FIELDS : NUM_FIELDS + 2]
    return x.new_empty(x.shape[0], weight.shape[0])  # type: ignore[no-any-return]


def _backward_shape(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    A, B, (_, x, _, needs_x, *needs_factors) = inputs[0], inputs[1], inputs[NUM_FIELDS:]
    needs = all(needs_factors)  # the branch's backward has no such argument: it always computes them
    like_A, like_B = (torch.empty_like(A), torch.empty_like(B)) if needs else (A.new_empty(0), B.new_empty(0))
    return torch.empty_like(x) if needs_x else x.new_empty(0), like_A, like_B


_fused = Kernel("fused_linear", "Tensor x, Tensor weight, Tensor? bias) -> Tensor", fused_forward, _output_shape)
_fused_backward = Kernel(
    "fused_linear_backward",
    "Tensor g, Tensor x, Tensor weight, bool needs_x, bool needs_factors) -> (Tensor, Tensor, Tensor)",
    fused_backward,
    _backward_shape,
)
_branch = Kernel("hadamard_branch", "Tensor x, Tensor anchor) -> Tensor", branch_forward, _output_shape)
_branch_backward = Kernel(
    "hadamard_branch_backward",
    "Tensor g, Tensor x, Tensor anchor, bool needs_x) -> (Tensor, Tensor, Tensor)",
    branch_backward,
    _backward_shape,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_contiguous, ctx.ranks, ctx.scaling = inputs[:NUM_FIELDS]
    ctx.save_for_backward(*tensors, *inputs[NUM_FIELDS : NUM_FIELDS + 2])


def _saved(ctx: Any) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    *tensors, x, weight = ctx.saved_tensors
    return (*tensors, ctx.is_contiguous, ctx.ranks, ctx.scaling), x, weight


def _fused_gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    needs_A, needs_B, needs_x, needs_bias = (ctx.needs_input_grad[i] for i in (0, 1, NUM_FIELDS, NUM_FIELDS + 2))
    fields, x, weight = _saved(ctx)
    grad_x, grad_A, grad_B = _fused_backward(*fields, g, x, weight, needs_x, needs_A or needs_B)
    grad_bias = g.sum(0) if needs_bias else None
    of_factors = grad_A if needs_A else None, grad_B if needs_B else None, *_NO_GRADIENTS
    return *of_factors, grad_x if needs_x else None, None, grad_bias


def _branch_gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    needs_x = ctx.needs_input_grad[NUM_FIELDS]
    fields, x, anchor = _saved(ctx)
    grad_x, grad_A, grad_B = _branch_backward(*fields, g, x, anchor, needs_x)
    return grad_A, grad_B, *_NO_GRADIENTS, grad_x if needs_x else None, None


_NO_GRADIENTS = (None,) * (NUM_FIELDS - 2)

_fused.operator.register_autograd(_fused_gradients, setup_context=_setup)
_branch.operator.register_autograd(_branch_gradients, setup_context=_setup)


class _FusedLinear(torch.autograd.Function):
    forward = staticmethod(_fused)
    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if not needs_plain_gradients(g):
            return _fused_gradients(ctx, g)
        _, _, weight = _saved(ctx)
        *of_branch, of_x, _ = _plain_gradients(ctx, g)
        of_x = None if of_x is None else of_x + g @ weight
        return *of_branch, of_x, None, g.sum(0) if ctx.needs_input_grad[NUM_FIELDS + 2] else None


class _HadamardBranch(torch.autograd.Function):
    forward = staticmethod(_branch)
    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return _plain_gradients(ctx, g) if needs_plain_gradients(g) else _branch_gradients(ctx, g)


def _plain_gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """`_branch_gradients`, as another formula."""
    fields, x, anchor = _saved(ctx)
    factors, needed = _factors(fields), [ctx.needs_input_grad[i] for i in (0, 1, NUM_FIELDS)]
    inputs = factors.A, factors.B, x
    of_A, of_B, of_x = plain_gradients(lambda: plain_branch(factors, x, anchor), inputs, needed, g)
    return of_A, of_B, *_NO_GRADIENTS, of_x, None


def fused(factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x(W + ΔW)ᵀ + b` for x (…, in_features); differentiable in x, A, B and bias, not in W."""
    y = _differentiable(_fused, _FusedLinear, factors, x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def branch(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`x ΔWᵀ` for x (…, in_features), computed in the dtype of x; differentiable in x, A and B, not in M."""
    y = _differentiable(_branch, _HadamardBranch, factors, x.reshape(-1, x.shape[-1]), anchor)
    return y.view(*x.shape[:-1], anchor.shape[0])


def branch_gradients(
    factors: Factors, g: Tensor, x: Tensor, anchor: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `branch` for x (None unless `needs_x`), A and B, given the gradient g of its output."""
    flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x, grad_A, grad_B = _branch_backward(*_fields(factors), flat_g, flat_x, anchor, needs_x)
    return grad_x.view(x.shape) if needs_x else None, grad_A, grad_B


def _differentiable(
    kernel: Kernel, function: type[torch.autograd.Function], factors: Factors, *rest: Tensor | None
) -> Tensor:
    if torch.compiler.is_compiling():
        y: Tensor = kernel.operator(*_fields(factors), *rest)
    elif torch.is_grad_enabled():
        y = function.apply(*_fields(factors), *rest)
    else:
        y = kernel.of(factors, *rest)
    return y


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch has no annotation here
def multiplies_exactly(device_type: str) -> bool:
    """Whether products of float32 matrices keep all 24 bits. A compiled model keeps the answer of its first call."""
    if not hasattr(torch.backends, "fp32_precision"):  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    return backend.matmul.fp32_precision not in ("tf32", "bf16")
