"""Computes `x ΔWᵀ` with PyTorch's own operations: without modulation, for transforms, and in compiled models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from smoa.maths.factors import Factors
from smoa.maths.kernels.block_runs import runs_of


def plain_branch(factors: Factors, x: Tensor, anchor: Tensor | None) -> Tensor:
    """`x ΔWᵀ`: (…, out_features), without modulation if `anchor` is None.

    With an anchor, autograd keeps the K modulated blocks, 1/K of W, and also differentiates the anchor.
    """
    blocks, flat = factors.blocks, x.reshape(-1, x.shape[-1])
    sorted_x, outputs = blocks.sort_inputs(flat), []
    wide = factors.wide(factors.B.dtype if anchor is None else None)
    for run in runs_of(factors):
        inputs, A, B = run.of_inputs(sorted_x), run.of_A(wide.A), run.of_B(wide.B)
        delta = None if anchor is None else (B @ A * run.of_matrix(anchor, blocks)).to(x.dtype)
        y = inputs @ A.mT @ B.mT if delta is None else inputs @ delta.mT
        outputs.append(y.transpose(0, 1).reshape(flat.shape[0], run.count * run.height))
    return blocks.unsort_outputs(torch.cat(outputs, dim=-1)).view(*x.shape[:-1], blocks.out_features)


def recomputed_branch(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`plain_branch` for a compiled model: the backward computes the blocks of ΔW again instead of keeping them.

    A compiler fuses gathers, products with M, scales and casts, which it could not do inside an operator. Without the
    checkpoint it would keep the blocks (measured: docs/experiment-log.md).
    """
    if not torch.is_grad_enabled():
        return plain_branch(factors, x, anchor)
    y: Tensor = checkpoint(plain_branch, factors, x, anchor, use_reentrant=False, preserve_rng_state=False)
    return y


def plain_gradients(
    compute: Callable[[], Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    """Gradients of the output of `compute` for the inputs that need them, given the gradient g of the output.

    For the backward of a Function whose kernels can't compute them (`needs_plain_gradients`).
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        y = compute()
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=differentiable, allow_unused=True))
    return [next(found) if need else None for need in needed]


def needs_plain_gradients(g: Tensor) -> bool:
    """Whether gradients are batched (`is_grads_batched`, `vmap`), or will be differentiated again (`create_graph`)."""
    return torch.is_grad_enabled() or is_transformed(g)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether only PyTorch's own operations can compute with these tensors, and nothing that is made may be kept.

    That is so under transforms (`torch.func`, batched gradients, forward-mode differentiation), in `torch.jit.trace`,
    and with fake tensors, which hold no numbers.
    """
    if torch.compiler.is_compiling():
        return False
    active = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    modes = torch._C._get_tracing_state(), torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return active or any(mode is not None for mode in modes) or any(map(_is_special, tensors))


def _is_special(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)
