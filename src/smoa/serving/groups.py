"""The adapters of a layer, stacked by slot: those with the same blocks, ranks and modulation take one product.

A fused layer, which vLLM makes of layers with the same input, such as q, k and v, is one weight of more blocks: those
of W_q, W_k and W_v, each with columns of x. So it takes as few products as a plain layer, which has one slice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import accumulate, count, islice

import torch
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.files.names import PARTS, PREFIX
from smoa.layers.weight_cache import tensor_state
from smoa.maths.blocks import Blocks, Orders
from smoa.maths.factors import BlockRun, runs_of
from smoa.maths.kernels.autograd import is_transformed, only_values
from smoa.maths.kernels.shared import Diagonal, Gathered, formed, shared
from smoa.serving.rows import Mark, Plan, Rows, RowsBySlot
from smoa.serving.saved import SavedLayer, Template

Parts = Sequence[SavedLayer | None]
"""An adapter's factors of each slice of a layer; None where it leaves a slice as it is."""
new_number = count(1).__next__


class LayerStack:
    """The adapters of a layer that have the same blocks, ranks and modulation, by slot.

    Args:
        parts: The first adapter's factors; it is not written yet.
        sizes: out_features of each slice of the layer.
        device: The weight's.
        dtype: Of the factors, by default the first adapter's.
    """

    members: frozenset[int] | None = None
    """The slots that are taken, if rows have other slots too."""
    fixed = False
    """Whether an optimizer holds the factors, which alone changes them past `write`."""

    def __init__(
        self, parts: Parts, sizes: Sequence[int], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        starts = accumulate(sizes, initial=0)
        slices = [(part, start, size) for part, start, size in zip(parts, starts, sizes, strict=False) if part]
        own = [part for part, _, _ in slices]
        blocks, dtype = [part.blocks(device) for part in own], dtype or own[0].A.dtype
        self.spans = None if len(own) == len(parts) else [(start, size) for _, start, size in slices]
        self.blocks = blocks[0] if len(parts) == 1 else _fused(blocks, [start for _, start, _ in slices])
        are_slices = len(parts) > 1 and all(each.is_contiguous for each in blocks)
        self._of_copies = replace(self.blocks, is_contiguous=True) if are_slices else None
        """The blocks of an x that is there once for each slice; None if their coordinates must be sorted."""
        self.runs, self._pieces = _runs(blocks, own)
        self.ranks = tuple(rank for part in own for rank in part.ranks)
        self.modulation, self.is_spectral = own[0].modulation, own[0].is_spectral
        shapes = [(1, run.rank, run.count, size) for run in self.runs for size in (run.width, run.height)]
        empty = [torch.zeros(0, *shape, dtype=dtype, device=device) for shape in shapes]
        block_scale = torch.zeros(0, len(self.ranks), device=device)
        empty += [block_scale, block_scale.to(torch.promote_types(dtype, torch.float32))]
        self.tensors = [nn.Parameter(tensor, requires_grad=False) for tensor in empty]
        """A and B of each run, (slots, 1, rank, blocks, width or height), rows of which are what `shared` takes; block
        scales and scales, (slots, blocks). They are a shelf's."""
        self._rank = 0 if self.modulation == "none" else max(self.ranks)
        self._changes = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All factors."""
        return self.tensors[:-2]

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each run."""
        return list(zip(self.tensors[:-2:2], self.tensors[1:-2:2], strict=True))

    @property
    def block_scale(self) -> Tensor:
        """The part of each block's scale that comes from the weight, (slots, blocks)."""
        return self.tensors[-2]

    @property
    def scale(self) -> Tensor:
        """The scale of each block, (slots, blocks), in float32 or wider."""
        return self.tensors[-1]

    def of_slot(self, parts: Parts) -> list[Tensor]:
        """What stands in the slot of an adapter with these parts: its factors, as in `parameters`, and block scales."""
        own = [part for part in parts if part]
        pieces, found = (run for part in own for run in part.in_runs()), list[Tensor]()
        for of_run in self._pieces:
            found += (torch.cat(each, 1)[None] for each in zip(*islice(pieces, of_run), strict=True))
        return [*found, torch.cat([part.block_scale for part in own])]

    def changed(self, slot: int) -> None:
        """Forget what was of the adapter that has left a slot."""
        for factor in self.parameters:
            if factor.grad is not None:
                factor.grad[slot] = 0
        self._changes += 1

    def read(self, slot: int) -> tuple[Tensor, ...]:
        """The tensors of the adapter in a slot of a plain layer, in the order of `PARTS`."""
        (like, _), rank = self.factors[0], sum(self.ranks)
        height, width = max(run.height for run in self.runs), max(run.width for run in self.runs)
        found = like.new_zeros(rank, width), like.new_zeros(height, rank)
        for (A, B), run in zip(self.factors, self.runs, strict=True):
            run.of_A(found[0]).copy_(A.data[slot, 0].transpose(0, 1))
            run.of_B(found[1]).copy_(B.data[slot, 0].permute(1, 2, 0))
        return *found, self.blocks.row_labels, self.blocks.col_labels, self.block_scale[slot]

    def add_to(self, output: Tensor, x: Tensor, rows: RowsBySlot, diagonal: Diagonal) -> None:
        """Add to an output (rows, …, out_features) what each row's adapter makes of x (rows, …, in_features).

        Differentiable in x and the factors.

        Args:
            output: Is written to.
            x: The layer's input.
            rows: The slot of each row.
            diagonal: The blocks of M, as `diagonal_of` gives them for `blocks` and `runs`; not called without one.
        """
        keeps = only_values(x)
        plan = rows.plan(self.members, self._rank, x.shape[1:-1].numel() if keeps else None, x.device)
        kept, marked = self._kept(plan, rows) if keeps else None, self.factors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed(x):
            (A, B), *others = self.factors
            marked = [(Mark.apply(A, rows.number), B), *others]  # type: ignore[no-untyped-call]
        blocks = self._of_copies or self.blocks
        if self._of_copies is not None:
            x = x.repeat(*[1] * (x.ndim - 1), blocks.in_features // x.shape[-1])
        for part in plan.parts:
            own = x[part.rows]
            if part.forms and kept is not None:
                factors = kept if part.places is None else [(A[part.places], B[part.places]) for A, B in kept]
                y = formed(blocks, self.runs, own.flatten(0, -2), factors, diagonal())
            else:
                gathered = kept or partial(self._gathered, marked, part.slots)
                groups = own.reshape(part.slots.shape[0], -1, own.shape[-1])
                writes = isinstance(part.rows, slice) and not self.spans and output.is_contiguous()
                total = output[part.rows].view(*groups.shape[:2], -1) if writes else None
                anchors = diagonal if self._rank else None
                y = shared(blocks, self.runs, groups, gathered, anchors, total, part.places)
                if writes:
                    continue
            self._add(output, part.rows, y.view(*own.shape[:-1], y.shape[-1]))

    def _kept(self, plan: Plan, rows: RowsBySlot) -> Gathered:
        """The factors of a plan's slots, kept for the next call: they take no more room than the adapters."""
        trained = self.parameters if self.fixed else []
        state = plan, self._changes, *map(tensor_state, trained)
        if (kept := rows.kept.get(self)) is None or kept[0] != state:
            kept = state, self._gathered(self.factors, plan.slots)
            if all(part.grad is None for part in trained):  # else a step may come, and leave no trace
                rows.kept[self] = kept
        found: Gathered = kept[1]
        return found

    def _gathered(self, factors: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> Gathered:
        """The factors of each slot, with the scale in B."""
        scale = self.scale.index_select(0, slots)[:, None, None, :, None]
        scales = scale.split([run.count for run in self.runs], dim=3)
        own = zip(factors, scales, strict=True)
        return [(A.index_select(0, slots), B.index_select(0, slots) * scale) for (A, B), scale in own]

    def _add(self, output: Tensor, rows: Rows, y: Tensor) -> None:
        first = 0
        for start, size in self.spans or [(0, y.shape[-1])]:
            target, own = (output, y) if not self.spans else (output.narrow(-1, start, size), y.narrow(-1, first, size))
            if isinstance(rows, slice):
                target[rows].add_(own)
            else:
                target.index_add_(0, rows, own.to(target.dtype))
            first += size

    def nbytes(self) -> int:
        """Bytes of factors, scales and blocks."""
        labels = self.blocks.row_labels, self.blocks.col_labels, *self.blocks.orders
        return sum(tensor.nbytes for tensor in (*self.tensors, *labels))


def _fused(blocks: Sequence[Blocks], starts: Sequence[int]) -> Blocks:
    """The blocks of slices of one weight, whose rows begin at these: W has them all, x once for each slice."""
    rows = torch.cat([own.orders.rows + start for own, start in zip(blocks, starts, strict=True)])
    firsts = accumulate((own.out_features for own in blocks), initial=0)
    rows_inverse = torch.cat([own.orders.rows_inverse + first for own, first in zip(blocks, firsts, strict=False)])
    cols, cols_inverse = (torch.cat([own.orders[place] for own in blocks]) for place in (2, 3))
    row_labels, col_labels = (
        torch.cat([getattr(own, side) for own in blocks]) for side in ("row_labels", "col_labels")
    )
    orders = Orders(rows, rows_inverse, cols, cols_inverse)
    return Blocks(row_labels, col_labels, sum(own.num_blocks for own in blocks), orders)


def _runs(blocks: Sequence[Blocks], parts: Sequence[SavedLayer]) -> tuple[list[BlockRun], list[int]]:
    """The runs of all slices, where neighbors of one shape are one run, and of how many of the slices' own each is."""
    runs, pieces, row, col, rank = list[BlockRun](), list[int](), 0, 0, 0
    for own, part in zip(blocks, parts, strict=True):
        for run in runs_of(*own.shape, part.ranks):
            last = runs[-1] if runs else None
            if last is not None and (last.height, last.width, last.rank) == (run.height, run.width, run.rank):
                runs[-1], pieces[-1] = replace(last, count=last.count + run.count), pieces[-1] + 1
            else:
                firsts = run.first_row + row, run.first_col + col, run.first_rank + rank
                runs.append(BlockRun(run.count, run.height, run.width, run.rank, *firsts))
                pieces.append(1)
        row, col, rank = row + own.out_features, col + own.in_features, rank + sum(part.ranks)
    return runs, pieces


class Shelf:
    """The tensors of stacks that are alike, one (stacks, slots, …) of each kind, so an adapter takes few copies."""

    def __init__(self, stacks: Sequence[LayerStack]) -> None:
        self.stacks = stacks
        self._parts = [part.detach().expand(len(stacks), *part.shape) for part in stacks[0].tensors]

    def grow(self, capacity: int) -> None:
        """Make room for so many adapters. Batches that run keep the old tensors."""
        for place, part in enumerate(self._parts):
            self._parts[place] = larger = part.new_zeros(len(part), capacity, *part.shape[2:])
            larger[:, : part.shape[1]] = part
            for stack, own in zip(self.stacks, larger, strict=True):
                trains = place < len(stack.parameters)
                stack.tensors[place] = nn.Parameter(own.data, requires_grad=trains)  # `data`: changes of its own

    def of_slot(self, adapter: Sequence[Parts]) -> list[Tensor]:
        """What stands in the slot of an adapter, given its parts of each stack."""
        own = (stack.of_slot(parts) for stack, parts in zip(self.stacks, adapter, strict=True))
        return [torch.stack(each) for each in zip(*own, strict=True)]

    def write(self, slot: int, values: Sequence[Tensor], scaling: Tensor) -> None:
        """Put an adapter into a slot: what `of_slot` gives, and α/r of each block, (stacks, blocks)."""
        scales = values[-1] * scaling.to(values[-1].device)
        for part, value in zip(self._parts, [*values, scales], strict=True):
            part.data[:, slot] = value
        for stack in self.stacks:
            stack.changed(slot)


@dataclass(eq=False)
class AdapterGroup:
    """Adapters with the same layers, blocks, ranks and modulation, by slot."""

    stacks: dict[str, LayerStack]
    free: list[int] = field(default_factory=list)
    capacity: int = 0

    def __post_init__(self) -> None:
        alike: dict[Hashable, list[str]] = {}
        for path, stack in self.stacks.items():
            kinds = [(part.shape, part.dtype, part.device) for part in stack.tensors]
            alike.setdefault(tuple(kinds), []).append(path)
        self._shelves = [(paths, Shelf([self.stacks[path] for path in paths])) for paths in alike.values()]
        self._places: tuple[Template | None, list[list[Tensor]]] = None, []
        """Where among an adapter's numbers those of each shelf are, for adapters by a template."""

    @property
    def fixed(self) -> bool:
        """Whether an optimizer holds the factors, which then keep their size."""
        return any(stack.fixed for stack in self.stacks.values())

    @property
    def is_empty(self) -> bool:
        """Whether no slot is taken."""
        return len(self.free) == self.capacity

    def has_room(self, leaving: Iterable[LoadedAdapter]) -> bool:
        """Whether there is a slot for one more adapter after these have left."""
        return not self.fixed or bool(self.free) or any(adapter.group is self for adapter in leaving)

    def take(self, slots: int | None) -> int:
        """A free slot; the tensors grow by an eighth where there is none."""
        if not self.free:
            larger = min(self.capacity + max(8, self.capacity // 8), max(slots or 1 << 62, self.capacity + 1))
            for _, shelf in self._shelves:
                shelf.grow(larger)
            self.free, self.capacity = list(range(self.capacity, larger))[::-1], larger
        return self.free.pop()

    def write(self, slot: int, template: Template, numbers: Tensor | None) -> None:
        """Put an adapter into a slot: the template itself, or one with these numbers."""

        def of_slot(numbers: Tensor | None) -> list[list[Tensor]]:
            layers = template.layers_of(numbers)
            return [shelf.of_slot([[layers[path]] for path in paths]) for paths, shelf in self._shelves]

        if numbers is None:
            values = of_slot(None)
        else:
            if self._places[0] is not template:
                self._places = template, of_slot(torch.arange(len(numbers)))
            values = [[numbers.take(places) for places in of_shelf] for of_shelf in self._places[1]]
        for (paths, shelf), own in zip(self._shelves, values, strict=True):
            shelf.write(slot, own, torch.tensor([[template.layers[path].scaling] for path in paths]))


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter that is loaded; no two ever have the same ``number``."""

    config: SmoaConfig
    group: AdapterGroup
    slot: int
    saved: bytes | None = None
    """The digest of what was loaded or saved last; None for a new adapter."""
    number: int = field(default_factory=new_number)

    @property
    def is_saved(self) -> bool:
        """Whether a folder has it as it is."""
        return self.saved is not None and self.saved == self.digest()

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors as they are saved."""
        own = {path: zip(PARTS, stack.read(self.slot), strict=True) for path, stack in self.group.stacks.items()}
        return {f"{PREFIX}{path}.{part}": each.cpu().clone() for path, parts in own.items() for part, each in parts}

    def factors(self) -> list[Tensor]:
        """Its factors A and B in each layer."""
        return [part.data[self.slot] for stack in self.group.stacks.values() for part in stack.parameters]

    def digest(self) -> bytes:
        """Another one for other factors; empty while no optimizer holds them, which alone changes them."""
        found = sha256()
        for part in self.factors() if self.group.fixed else ():
            found.update(part.cpu().view(torch.uint8).numpy().tobytes())
        return found.digest()
