"""What adapted layers keep for calls without gradients, so that decoding token by token need not form ΔW again.

Forming ΔW takes a pass over the weight: cheap for a training batch, expensive for one token. While caches are open, as
`generate` opens them (`smoa.tuner.generation`), an adapted layer keeps after its first call without gradients the
diagonal blocks of ΔW, in the dtype of its input: 1/K of the memory that the adapted weights take.

What a layer keeps has a key: the versions of factors, labels, scales and base weight, and the dtype. If one changes,
the next call computes it again. A call with gradients drops it, for PyTorch's version counters leave out the writes of
fused optimizers. Writes through `tensor.data` are not noticed. What a call doesn't use is dropped. For a batch of many
adapters the factors of all layers are looked at once in each forward of the model (`Watch`).

Caches that are open already are shared, and the last user closes them, so that calls may be nested, or run in several
threads: two threads may compute a value twice, and both are right. If memory runs out while a layer fills its cache,
all layers drop theirs, and compute as without one.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from smoa.maths.blocks import Blocks
from smoa.maths.factors import BlockRun
from smoa.maths.kernels.autograd import is_transformed
from smoa.maths.kernels.branch import multiply
from smoa.maths.update import Update

T = TypeVar("T")
BLOCKS, DIAGONAL, STACKED = "blocks of ΔW", "blocks of W", "factors of a batch"
_LOCK = threading.Lock()


@dataclass(eq=False)
class WeightCache:
    """What one layer keeps: values by kind and the adapters that they are made of, with the state that they came from.

    Args:
        watch: Knows the caches that were opened together, and sees what changes in their layers.
    """

    watch: Watch
    users: int = 0
    gave_up: bool = False
    kept: dict[tuple[str, ...], tuple[Hashable, Any]] = field(default_factory=dict)

    def get(self, slot: tuple[str, ...], key: Hashable, make: Callable[[], T]) -> T | None:
        """The value for `slot` (kind, then adapters) in the state `key`; None if there is no memory for it."""
        if self.gave_up:
            return None
        kept = self.kept.get(slot)
        if kept is not None and kept[0] == key:
            return kept[1]  # type: ignore[no-any-return]
        self.kept.pop(slot, None)
        try:
            value = make()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not should_reduce_batch_size(error):
                raise
            self._give_up(error)
            return None
        self.kept[slot] = key, value
        return value

    def _give_up(self, error: Exception) -> None:
        for cache in self.watch.caches:
            cache.gave_up = True
            cache.clear()
        message = f"no memory to keep ΔW for decoding, so it is formed again for every token ({error})"
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def retain(self, kinds: Collection[str], names: Collection[str]) -> None:
        """Drop all but values of these kinds that are made of these adapters."""
        for slot in list(self.kept):
            if slot[0] not in kinds or (slot[0] == BLOCKS and not set(names).issuperset(slot[1:])):
                self.kept.pop(slot, None)

    def nbytes(self) -> int:
        """Bytes that are kept."""
        values = [value if isinstance(value, list) else [value] for _, value in self.kept.values()]
        return sum(part.nbytes for value in values for part in value)

    def clear(self) -> None:
        """Drop everything."""
        self.kept = {}


@dataclass(frozen=True)
class KeptUpdate:
    """The diagonal blocks of one ΔW: (blocks, height, width) for each run of blocks of one shape."""

    blocks: Blocks
    runs: list[tuple[BlockRun, Tensor]]

    @classmethod
    def of(cls, update: Update, weight: Tensor, dtype: torch.dtype) -> KeptUpdate:
        """What is kept of an `update` of the pristine `weight`, for x of `dtype`."""
        return cls(update.factors.blocks, update.kept_blocks(weight, dtype))

    def apply(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ`: (…, out_features) in the dtype of x, not differentiable."""
        return multiply(self.blocks, x, self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(entries.nbytes for _, entries in self.runs)


class Watch:
    """Sees what changes in the adapters of all layers whose caches were opened together.

    It looks once in each forward of the model: when a layer asks that has asked since the last look. What is written
    while a forward runs, or between calls of two parts of the model, is seen by the next one.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.caches: list[WeightCache] = []
        self._asked: set[int] = set()
        self._known: list[int] = []
        self._parameters: list[dict[str, Any]] = []
        self._seen: Any = None
        self._changes = 0

    def state(self, layer: nn.Module) -> Hashable:
        """Changes when an adapter of a layer is written to, replaced, cast or moved, and with each optimizer's step."""
        if not self._asked or id(layer) in self._asked:
            self._asked.clear()
            if (found := self._look()) != self._seen:
                self._seen, self._changes = found, self._changes + 1
        self._asked.add(id(layer))
        return self._changes, _steps

    def _look(self) -> Any:
        if (known := [layer.changes() for layer in self.layers]) != self._known:
            parts = [part for layer in self.layers for part in (layer.smoa_A, layer.smoa_B)]
            self._known, self._parameters = known, [factor._parameters for part in parts for factor in part.values()]
        weights = [parameters.get("weight") for parameters in self._parameters]
        scaling = [[*layer.scaling.values()] for layer in self.layers]
        try:
            versions = list(map(attrgetter("_version"), weights))
        except (RuntimeError, AttributeError):  # made in inference mode, or computed by a parametrization
            versions = []
        return known, list(map(id, weights)), versions, scaling


_steps = 0


def _count_step(*_: Any) -> None:
    """Counts the steps of all optimizers of this process: fused ones write past the version counters."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def tensor_state(tensor: Tensor) -> Hashable:
    """A value that changes when the tensor is written to, replaced, cast or moved, and with each optimizer's step if it
    may be trained."""
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.requires_grad and _steps + 1


def open_cache(layer: Any, names: list[str], x: Tensor) -> WeightCache | None:
    """A layer's cache for a call with these adapters, if one is open.

    Calls with active dropout, compiled models and transforms use none. Nor do calls while a factor has a gradient: an
    optimizer's step may come, and fused ones write past the version counters.
    """
    cache: WeightCache | None = layer.smoa_weight_cache
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or cache is None:
        return None
    if layer.may_have_gradients:
        factors = [*layer.smoa_A.parameters(), *layer.smoa_B.parameters()]
        layer.may_have_gradients = any(factor.grad is not None for factor in factors)
        if layer.may_have_gradients:
            return None
    dropped = layer.training and any(isinstance(layer.smoa_dropout[name], nn.Dropout) for name in names)
    return None if dropped or cache.gave_up or is_transformed(x) else cache


def drop_kept(layer: Any) -> None:
    """Drop what calls without gradients keep: a step of training needs the memory, and fused optimizers write past the
    version counters."""
    if layer.last_batch is not None:
        layer.last_batch = None
    layer.may_have_gradients = True
    if layer.smoa_weight_cache is not None:
        for cache in layer.smoa_weight_cache.watch.caches:
            cache.clear()


def state_of_update(layer: Any, name: str) -> tuple[Hashable, ...]:
    """Changes when ΔW of an adapter does."""
    tensors = layer.stored_weight(), *layer.factors(name), *layer.adapters[name].saved()
    return layer.scaling[name], *map(tensor_state, tensors)


@contextmanager
def open_caches(layers: Iterable[Any]) -> Iterator[None]:
    """Open the caches of adapted layers; the last user closes them."""
    opened: list[tuple[Any, WeightCache]] = []
    watch = Watch()
    with _LOCK:
        for layer in layers:
            if layer.smoa_weight_cache is None:
                layer.smoa_weight_cache = WeightCache(watch)
                watch.layers.append(layer)
                watch.caches.append(layer.smoa_weight_cache)
            cache: WeightCache = layer.smoa_weight_cache
            cache.users += 1
            opened.append((layer, cache))
    try:
        yield
    finally:
        with _LOCK:
            for layer, cache in opened:
                cache.users -= 1
                if not cache.users:
                    layer.smoa_weight_cache = None
                    cache.clear()  # frees it now: they hold each other until the garbage collector comes


def why_not_plain(layer: Any) -> str | None:
    """What an adapted layer's weight is, if it isn't a plain one in this process's memory."""
    if any(parameter.is_meta for parameter in layer.parameters()):
        return "offloaded"
    if is_sharded(layer):
        return "sharded over processes"
    return None if layer.quantization_backend is None else "quantized"


def is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 shards parameters of an adapted layer."""
    parameters = list(layer.parameters())
    # ZeRO-3 may have left a parameter whole (`ds_id`), but replaces it in every step
    whole = [p for p in parameters if p.numel() and not isinstance(p, DTensor) and not hasattr(p, "ds_id")]
    factors: list[nn.Module] = [layer.smoa_A, layer.smoa_B]  # type: ignore[list-item]  # torch types attributes so
    flat = any(p.ndim != 2 for factor in factors for p in factor.parameters())  # FSDP1's shards
    return not parameters or len(whole) < len(parameters) or flat
