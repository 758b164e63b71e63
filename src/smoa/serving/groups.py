"""Where a pool's adapters stand: stacked by layer, those with the same blocks and ranks together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.errors import ConfigError
from smoa.files.names import PARTS
from smoa.layers.layer import RANDOM_SIZE
from smoa.layers.weight_cache import tensor_state
from smoa.maths.blocks import Blocks
from smoa.maths.factors import BlockRun, init_factors, runs_of
from smoa.maths.kernels.shared import Gathered, StackedFactors
from smoa.maths.scale import ModulationKind, rank_scale
from smoa.serving.rows import Plan, Tokens
from smoa.serving.saved import Loaded
from smoa.tuner.generation import COPIES

new_number = count(1).__next__


class NoSlotError(ConfigError):
    """All slots are in use; one will be free once a batch or a request ends."""


@dataclass(eq=False)
class Place:
    """One layer's factors of all adapters of a shelf."""

    layer: nn.Module
    blocks: Blocks
    ranks: tuple[int, ...]
    runs: tuple[BlockRun, ...]
    modulation: ModulationKind
    spectral: bool
    factors: tuple[nn.Parameter, nn.Parameter]
    block_scale: Tensor
    scale: Tensor

    @classmethod
    def like(cls, each: Loaded, layer: nn.Module, dtype: torch.dtype | None) -> Place:
        """Without a slot yet."""
        device = next(layer.parameters()).device
        blocks = each.blocks(device)
        dtype = dtype or each.A.dtype
        A, B = (nn.Parameter(torch.zeros(0, *part.shape, dtype=dtype, device=device)) for part in (each.A, each.B))
        block_scale = torch.zeros(0, len(each.ranks), device=device)
        scale = torch.zeros(0, sum(each.ranks), dtype=torch.promote_types(dtype, torch.float32), device=device)
        runs = runs_of(*blocks.shape, each.ranks)
        return cls(layer, blocks, each.ranks, runs, each.modulation, each.spectral, (A, B), block_scale, scale)

    @property
    def stack(self) -> StackedFactors:
        """The factors as the product takes them."""
        return StackedFactors(*self.factors, self.scale, self.blocks, self.runs)

    def grow(self, capacity: int) -> None:
        """Make room for so many adapters."""

        def grown(tensor: Tensor) -> Tensor:
            larger = tensor.new_zeros(capacity, *tensor.shape[1:])
            larger[: len(tensor)] = tensor
            return larger

        A, B = (nn.Parameter(grown(part.detach())) for part in self.factors)  # batches that run keep the old ones
        self.factors, self.block_scale, self.scale = (A, B), grown(self.block_scale), grown(self.scale)

    @torch.no_grad()
    def write(self, slot: int, each: Loaded, fresh: bool, config: SmoaConfig) -> None:
        """Put an adapter's factors and scales into a slot; new ones are drawn."""
        for part in self.factors:
            if part.grad is not None:  # of the adapter that has left
                part.grad[slot] = 0
        A, B = (part.data[slot] for part in self.factors)
        self.block_scale[slot] = each.block_scale
        of_ranks = rank_scale(self.block_scale[slot], self.ranks)
        self.scale[slot] = of_ranks * each.scaling
        if not fresh:
            A.copy_(each.A)
            B.copy_(each.B)
            return
        init_factors(A, B, self.blocks.shape, self.ranks, config.init_weights, RANDOM_SIZE / each.scaling)
        if config.init_weights is False:
            B.div_(of_ranks)  # the same size for every scale, as in an adapted layer

    def parts(self, slot: int) -> list[tuple[str, Tensor]]:
        """The tensors of a slot's adapter as they are saved."""
        A, B = (part.detach()[slot].cpu().clone() for part in self.factors)
        labels = self.blocks.row_labels.cpu().clone(), self.blocks.col_labels.cpu().clone()
        return list(zip(PARTS, (A, B, *labels, self.block_scale[slot].cpu().clone()), strict=True))

    def nbytes(self) -> int:
        """Bytes of factors, scales and blocks."""
        tensors = *self.factors, self.block_scale, self.scale, self.blocks.row_labels, self.blocks.col_labels
        return sum(tensor.nbytes for tensor in (*tensors, *self.blocks.orders))


@dataclass(eq=False)
class Shelf:
    """Adapters with the same layers, blocks, ranks and modulation, by slot."""

    places: dict[str, Place]
    free: list[int] = field(default_factory=list)
    capacity: int = 0
    fixed: bool = False
    """Whether an optimizer holds the factors, which then keep their size."""

    @property
    def is_empty(self) -> bool:
        """Whether no slot is taken."""
        return len(self.free) == self.capacity

    def has_room(self, leaving: Iterable[Member]) -> bool:
        """Whether there is a slot for one more adapter after these have left."""
        return not self.fixed or bool(self.free) or any(member.shelf is self for member in leaving)

    def take(self, slots: int | None) -> int:
        """A free slot; the tensors grow by an eighth where there is none."""
        if not self.free:
            larger = min(self.capacity + max(8, self.capacity // 8), max(slots or 1 << 62, self.capacity + 1))
            for place in self.places.values():
                place.grow(larger)
            self.free, self.capacity = list(range(self.capacity, larger))[::-1], larger
        return self.free.pop()


@dataclass(eq=False)
class Member:
    """An adapter that is loaded; no two ever have the same ``number``."""

    config: SmoaConfig
    shelf: Shelf
    slot: int
    saved: bytes | None = None
    """The digest of what was loaded or saved last; None for a new adapter."""
    number: int = field(default_factory=new_number)

    @property
    def is_saved(self) -> bool:
        """Whether a folder has it as it is. Only an optimizer, which holds the factors, changes them."""
        return self.saved is not None and (not self.shelf.fixed or self.saved == self.digest())

    def digest(self) -> bytes:
        """Another one for other factors."""
        found = sha256()
        for place in self.shelf.places.values():
            for part in place.factors:
                found.update(part.detach()[self.slot].cpu().view(torch.uint8).numpy().tobytes())
        return found.digest()


Diagonals = WeakKeyDictionary[Place, tuple[Hashable, Sequence[Tensor]]]


class Batch:
    """The adapter of each row, None for the base, and what calls with these rows keep.

    Args:
        members: The adapters.
        diagonals: The diagonal blocks of W by place, and the state that they came from; batches may share them.
    """

    keeps = True
    """Whether the factors of each row are kept for the next call."""
    is_open = False
    """Whether its `use` has begun and not ended."""
    trains = False
    """Whether gradients were on when it was opened."""
    streams: tuple[FrameType, ...] = ()
    """While it is open, the generators in which it was opened, the innermost first."""
    thread = 0
    """The thread that opened it."""
    is_of_stream = False
    """Whether there were any."""

    def __init__(self, members: Sequence[Member | None], diagonals: Diagonals | None = None) -> None:
        self.members = members
        self.shelves = {id(member.shelf): member.shelf for member in members if member is not None}.values()
        self.diagonals = Diagonals() if diagonals is None else diagonals
        self.gathered: dict[int, tuple[Hashable, Any]] = {}
        self.number = new_number()
        self._tokens: dict[tuple[int, int, int], Tokens] = {}

    def rows(self, x: Tensor) -> Tensor:
        """x with its rows, to each of which belongs one adapter, as the first dimension."""
        return x

    def tokens(self, shelf: Shelf, count: int, path: str) -> Tokens:
        """The slots of the `count` rows that the layer at `path` is given in a shelf."""
        key = id(shelf), count, COPIES.get()
        if key not in self._tokens:
            served = (-1 if own is None or own.shelf is not shelf else own.slot for own in self.members_of(count, path))
            self._tokens[key] = Tokens(list(served))
        return self._tokens[key]

    def members_of(self, count: int, path: str) -> Sequence[Member | None]:
        """The adapter of each row. Only `generate` says that it repeats samples, and how often."""
        if count == len(self.members):
            return self.members
        if count == len(self.members) * (copies := COPIES.get()):
            return [member for member in self.members for _ in range(copies)]
        raise ConfigError(
            f"AdapterPool.use: {len(self.members)} names, but {path} is given {count} rows; name an adapter for each "
            "sample of the batch, and none that adapts a layer whose rows are not samples"
        )

    def factors(self, place: Place, plan: Plan) -> tuple[Iterable[Gathered], Iterable[Gathered]]:
        """The factors of a plan's slots apart, and of its chunks."""
        state = plan, *map(tensor_state, place.factors)
        kept = self.gathered.get(id(place))
        if kept is not None and kept[0] == state:
            return kept[1]  # type: ignore[no-any-return]
        stack, device = place.stack, place.scale.device
        apart = (stack.gathered(torch.tensor([slot], device=device)) for slot, _ in plan.apart)
        together = (stack.gathered(slots) for _, slots in plan.together)
        if not self.keeps or any(
            part.grad is not None for part in place.factors
        ):  # a step may come, and leave no trace
            return apart, together
        self.gathered[id(place)] = state, (list(apart), list(together))
        return self.gathered[id(place)][1]  # type: ignore[no-any-return]
