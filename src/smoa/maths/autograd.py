"""The kernels as differentiable operators.

Custom operators, not `torch.autograd.Function`s: `torch.compile` can neither break the graph at them nor decide to keep
an m×n intermediate for the backward. Differentiating twice raises PyTorch's error that names the backward operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, get_type_hints

import torch
from torch import Tensor

from smoa.maths import kernels


def _operator(name: str, kernel: Callable[..., Any]) -> Any:
    @wraps(kernel)
    def without_autocast(*args: Any) -> Any:
        # autocast reaches into operators written in Python; the kernels choose every dtype themselves
        with torch.autocast(args[0].device.type, enabled=False):
            return kernel(*args)

    without_autocast.__annotations__ = get_type_hints(kernel)
    return torch.library.custom_op(f"smoa::{name}", without_autocast, mutates_args=())


_fused = _operator("fused_linear", kernels.fused_forward)
_fused_backward = _operator("fused_linear_backward", kernels.fused_backward)
_branch = _operator("hadamard_branch", kernels.branch_forward)
_branch_backward = _operator("hadamard_branch_backward", kernels.branch_backward)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch's is not annotated
def multiplies_exactly(device_type: str) -> bool:
    """Whether products of float32 matrices keep all 24 bits; a compiled model keeps the answer of its first call."""
    if not hasattr(torch.backends, "fp32_precision"):  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    return backend.matmul.fp32_precision not in ("tf32", "bf16")


def _output_shape(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fused_backward_shape(g: Tensor, x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_factors = rest[-2:]
    like_A, like_B = (torch.empty_like(A), torch.empty_like(B)) if needs_factors else (A.new_empty(0), B.new_empty(0))
    return torch.empty_like(x) if needs_x else x.new_empty(0), like_A, like_B


def _branch_backward_shape(g: Tensor, x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x) if rest[-1] else x.new_empty(0), torch.empty_like(A), torch.empty_like(B)


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A, B, weight, _, row_labels, col_labels, ctx.ranks, ctx.scaling = inputs
    ctx.save_for_backward(x, A, B, weight, row_labels, col_labels)


def _fused_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_A, needs_B, _, needs_bias = ctx.needs_input_grad[:5]
    grad_x, grad_A, grad_B = _fused_backward(g, *ctx.saved_tensors, ctx.ranks, ctx.scaling, needs_x, needs_A or needs_B)
    grad_bias = g.sum(0) if needs_bias else None
    grads = (grad_x if needs_x else None, grad_A if needs_A else None, grad_B if needs_B else None)
    return *grads, None, grad_bias, None, None, None, None


def _branch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ranks, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _branch_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_A, grad_B = _branch_backward(g, *ctx.saved_tensors, ctx.ranks, ctx.scaling, needs_x)
    return grad_x if needs_x else None, grad_A, grad_B, None, None, None, None, None


_fused.register_fake(_output_shape)
_branch.register_fake(_output_shape)
_fused_backward.register_fake(_fused_backward_shape)
_branch_backward.register_fake(_branch_backward_shape)
_fused.register_autograd(_fused_gradients, setup_context=_fused_setup)
_branch.register_autograd(_branch_gradients, setup_context=_branch_setup)


def fused_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_labels: Tensor,
    col_labels: Tensor,
    ranks: Sequence[int],
    scaling: float,
) -> Tensor:
    """`x(W + ΔW)ᵀ + b` for x of any leading shape; differentiable in x, A, B and bias, not in W."""
    y: Tensor = _fused(x.reshape(-1, x.shape[-1]), A, B, weight, bias, row_labels, col_labels, ranks, scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


def hadamard_branch(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    ranks: Sequence[int],
    scaling: float,
) -> Tensor:
    """`x ΔWᵀ` for x of any leading shape, computed in the dtype of x; differentiable in x, A and B, not in W."""
    y: Tensor = _branch(x.reshape(-1, x.shape[-1]), A, B, weight, row_labels, col_labels, ranks, scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


def hadamard_branch_backward(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    ranks: Sequence[int],
    scaling: float,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `hadamard_branch` for x (None unless `needs_x`), A and B, from that of its output."""
    flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x, grad_A, grad_B = _branch_backward(
        flat_g, flat_x, A, B, weight, row_labels, col_labels, ranks, scaling, needs_x
    )
    return grad_x.view(x.shape) if needs_x else None, grad_A, grad_B
