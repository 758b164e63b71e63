"""What one `generate` keeps, so that decoding token by token need not form ΔW again.

Forming ΔW takes a pass over the weight: cheap for a training batch, expensive for one token. So `generate`
(`smoa.generation`) opens a `Snapshot`, in which an adapted layer keeps, after its first call without gradients,
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
from typing import Any, TypeVar

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from smoa.kernels.blocks import Deltas, block_deltas, multiply
from smoa.partition import Blocks

T = TypeVar("T")


class Snapshot:
    """What these layers keep, by what it is of."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = frozenset(layers)
        self.kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T | None:
        """The value of this key, made at its first use; None if there is no memory for it."""
        if not self.layers:
            return None
        if key not in self.kept:
            try:
                self.kept[key] = make()
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not should_reduce_batch_size(error):
                    raise
                self.layers = frozenset[nn.Module]()
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


def open_snapshot(layer: Any, names: Iterable[str]) -> Snapshot | None:
    """Where a layer may keep something of these adapters in a call that computes values alone, if anywhere; not while
    dropout acts."""
    snapshot: Snapshot | None = getattr(_OPEN, "snapshot", None)
    if snapshot is None or layer not in snapshot.layers or (layer.training and any(map(layer.dropped, names))):
        return None
    return snapshot


def kept_output(layer: Any, x: Tensor, adapter_name: str) -> Tensor | None:
    """`x ΔWᵀ` in the dtype of x, not differentiable, from blocks that the open snapshot keeps; None without memory."""

    def made() -> tuple[Blocks, Deltas]:
        update = layer.update(adapter_name)
        return update.blocks, block_deltas(update, layer.pristine_weight(), x.dtype)

    kept = _OPEN.snapshot.get((layer, layer.adapters[adapter_name], x.dtype), made)
    return None if kept is None else multiply(x, *kept)
