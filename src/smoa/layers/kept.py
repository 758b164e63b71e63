"""What one `generate` keeps, so that decoding token by token need not form ΔW again.

Forming ΔW takes a pass over the weight: cheap for a training batch, expensive for one token. So `generate`
(`smoa.tuner.generation`) opens a `Snapshot`, in which an adapted layer keeps, after its first call without gradients,
the diagonal blocks of ΔW, in the dtype of its input: 1/K of the memory that the adapted weights take. For a batch with
an adapter for each row it keeps the factors of these adapters, and the diagonal blocks of W once for all of them.

A snapshot belongs to the call of `generate` and to its thread: two threads that generate hold two. Values that change
while it is open (factors, scales, weights) count from the next call on. Which adapters are active, named or disabled is
asked in each forward. If memory runs out while a layer fills it, it drops everything, and layers compute as without.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from smoa.maths.blocks import Blocks
from smoa.maths.kernels.autograd import is_transformed
from smoa.maths.kernels.branch import Deltas, block_deltas, multiply
from smoa.maths.update import Update

T = TypeVar("T")


class Snapshot:
    """What these layers keep, by what it is of."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = frozenset(layers)
        self.kept: dict[Hashable, Any] = {}
        self._is_full = False

    def get(self, key: Hashable, make: Callable[[], T]) -> T | None:
        """The value of this key, made at its first use; None if there is no memory for it."""
        if self._is_full:
            return None
        if key not in self.kept:
            try:
                self.kept[key] = make()
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not should_reduce_batch_size(error):
                    raise
                self._is_full = True
                self.kept.clear()
                message = f"no memory to keep ΔW for decoding, so it is formed again for every token ({error})"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                return None
        value: T = self.kept[key]
        return value


_OPEN = threading.local()


@contextmanager
def snapshot_of(layers: Iterable[nn.Module]) -> Iterator[Snapshot]:
    """Let these layers keep what calls in this thread use again, while the context is open."""
    before, _OPEN.snapshot = getattr(_OPEN, "snapshot", None), Snapshot(layers)
    try:
        yield _OPEN.snapshot
    finally:
        _OPEN.snapshot = before


def open_snapshot(layer: Any, names: Iterable[str], x: Tensor) -> Snapshot | None:
    """Where a layer may keep something of these adapters in this call, if anywhere.

    Calls with gradients or active dropout, compiled models and transforms keep nothing.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    snapshot: Snapshot | None = getattr(_OPEN, "snapshot", None)
    if snapshot is None or layer not in snapshot.layers or is_transformed(x):
        return None
    dropped = layer.training and any(isinstance(layer.smoa_dropout[name], nn.Dropout) for name in names)
    return None if dropped else snapshot


@dataclass(frozen=True)
class KeptUpdate:
    """The diagonal blocks of one ΔW."""

    blocks: Blocks
    deltas: Deltas

    @classmethod
    def of(cls, update: Update, weight: Tensor, dtype: torch.dtype) -> KeptUpdate:
        """What is kept of an `update` of the pristine `weight`, for x of `dtype`."""
        return cls(update.factors.blocks, block_deltas(update.factors, weight, dtype))

    def apply(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ`: (…, out_features) in the dtype of x, not differentiable."""
        return multiply(self.blocks, x, self.deltas)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(entries.nbytes for _, entries in self.deltas)
