"""Makes the kernels differentiable, each with a backward that computes again what autograd would keep.

`recomputed` is one `autograd.Function` for all `Route`s. Gradients that are batched, or differentiated again, are
computed by PyTorch's own operations. So is all of a compiled model, under a checkpoint (`checkpointed`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Route(Protocol):
    """A way to compute an output y from factors (`Factors`, or another dataclass with A and B), x and a weight."""

    def forward(self, factors: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y, not differentiable."""

    def plain(self, factors: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """y by PyTorch's own operations, differentiable in the weight too; called without autocast."""

    def backward(self, factors: Any, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> Gradients:
        """Gradients, given that of y, for x (anything unless `needs_x`), A and B (anything unless they train)."""


def recomputed(
    route: Route, factors: Any, x: Tensor, weight: Tensor | Callable[[], Tensor], bias: Tensor | None = None
) -> Tensor:
    """y of the route, differentiable in x, A, B and bias: the one place that decides who computes it.

    PyTorch's own operations do where the weight trains, and under transforms. So they do in a compiled model, whose
    compiler fuses gathers, products, scales and casts, under a checkpoint, without which it would keep what they make
    (docs/experiment-log.md, "One batched product for all blocks"). Nothing of the weight's size is kept for the
    backward, unless the weight trains or a transform is active.

    Args:
        weight: The weight or, if it is made anew for each use, a function that makes it.
    """
    if callable(weight) and is_transformed(x):
        weight = weight()
    if not callable(weight) and (torch.compiler.is_compiling() or weight.requires_grad or is_transformed(x, weight)):
        is_exported = getattr(torch.compiler, "is_exporting", bool)()  # into a program that can't be checkpointed
        plain = partial(checkpointed, route.plain) if torch.compiler.is_compiling() and not is_exported else route.plain
        with without_autocast(x.device.type):  # it would round the factors
            return plain(factors, x, weight, bias)
    if torch.is_grad_enabled():
        y: Tensor = _Recomputed.apply(route, factors, factors.A, factors.B, x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    with without_autocast(factors.A.device.type):
        return route.forward(factors, x, weight() if callable(weight) else weight, bias)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast, because the kernels choose every dtype themselves."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, route: Route, factors: Any, A: Tensor, B: Tensor, x: Tensor, weight: Any, bias: Tensor | None
    ) -> Tensor:
        made, trains = callable(weight), any(ctx.needs_input_grad[2:4])
        kept = x if trains or not x.is_floating_point() else x.new_zeros(()).expand(x.shape)  # y is linear in x
        ctx.save_for_backward(A, B, kept, None if made else weight)
        ctx.route, ctx.factors, ctx.make = route, replace(factors, A=None, B=None), weight if made else None
        with without_autocast(factors.A.device.type):
            return route.forward(factors, x, weight() if made else weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        A, B, x, weight = ctx.saved_tensors
        _, _, needs_A, needs_B, needs_x, _, needs_bias = ctx.needs_input_grad
        route: Route = ctx.route
        factors = replace(ctx.factors, A=A, B=B)
        with without_autocast(factors.A.device.type):
            weight = weight if ctx.make is None else ctx.make()
            differentiable = torch.is_grad_enabled()  # `create_graph`
            if differentiable or is_transformed(g):  # batched, as by `vmap`
                x = x if x.requires_grad == needs_x else x.detach().requires_grad_()
                with torch.enable_grad():
                    y = route.plain(factors, x, weight)
                needed = [each for each, needs in ((A, needs_A), (B, needs_B), (x, needs_x)) if needs]
                found = iter(torch.autograd.grad(y, needed, g, create_graph=differentiable, allow_unused=True))
                of_A, of_B, of_x = (next(found) if needs else None for needs in (needs_A, needs_B, needs_x))
            else:
                of_x, of_A, of_B = route.backward(factors, g, x, weight, needs_x)
        of_bias = g.sum([0, *range(2, g.dim())]) if needs_bias else None
        return None, None, of_A, of_B, of_x if needs_x else None, None, of_bias


def checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, of PyTorch's own operations; the backward computes again what autograd would keep."""
    if not torch.is_grad_enabled():
        return function(*args)
    y: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return y


def is_transformed(*tensors: Tensor) -> bool:
    """Whether only PyTorch's own operations can compute with these tensors, and nothing that is made may be kept.

    That is so under transforms (`torch.func`, batched gradients, forward-mode differentiation), in `torch.jit.trace`,
    and with fake tensors, which hold no numbers.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch._C._get_tracing_state() is not None or torch._C._get_dispatch_mode(_FAKE) is not None:
        return True
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return any(isinstance(each, FakeTensor) or is_batched(each) for each in tensors)


def only_values(x: Tensor) -> bool:
    """Whether a call computes numbers and nothing else: without gradients, transforms or a compiler, so that what it
    makes may be written to, and kept."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(x))
