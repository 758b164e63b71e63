"""The adapters of one layer, stacked by slot: those with the same blocks, ranks and modulation share their products.

A fused layer, which an engine makes of layers with one input, such as q, k and v, has a slice of each, with blocks of
its own. With tensor parallelism a rank has some rows or columns of each slice, and so a piece of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import accumulate
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from smoa.kernels.blocks import product_dtype
from smoa.kernels.factors import BlockRun
from smoa.kernels.plan import Plan, RowsBySlot, add_by_plan
from smoa.kernels.shared import Diagonal, Gathered, of_slots
from smoa.partition import Blocks, Orders, ascend
from smoa.vllm.saved import SavedLayer

Parts = Sequence[SavedLayer | None]
"""An adapter's factors of each slice of a layer; None where it leaves a slice as it is."""
Own = Callable[[], Sequence[tuple[Tensor, Tensor]]]
"""Gives the outputs and inputs of each slice that this rank of tensor parallelism has."""
Weight = Callable[[], tuple[Tensor, bool]]
"""Gives this rank's W (out_features, in_features), and whether it is stored so."""
Cut = Callable[[SavedLayer], tuple[Tensor, Tensor]]
"""Gives A (rank, blocks, width) and B (rank, blocks, height) with the scale in it, of an adapter's slice."""


class Piece:
    """The parts of a slice's blocks that a rank of tensor parallelism has, padded to one shape for one product.

    A padded place reads the first coordinate, and the factors are zero there. A block of which the rank has no rows is
    left out; so are blocks at both ends without columns, if labels ascend. If the rest are neighbors of equal size,
    they are slices of x, y and W, and nothing is gathered.

    Args:
        part: An adapter with the blocks.
        own: The outputs and inputs that the rank has; None for all.
    """

    def __init__(self, part: SavedLayer, own: tuple[Tensor, Tensor] | None) -> None:
        K, self._width = len(part.ranks), part.A.shape[1]
        labels = [side.cpu().long() for side in (part.row_labels, part.col_labels)]
        here = labels if own is None else [side[mine] for side, mine in zip(labels, own, strict=True)]
        counts = [torch.bincount(side, minlength=K) for side in here]
        kept = counts[0] > 0
        if ascend(*here):
            whole = (kept & (counts[1] > 0)).nonzero()
            kept[: whole[0]] = kept[whole[-1] + 1 :] = False
        self.kept: list[int] = kept.nonzero().flatten().tolist()
        tables, orders, self._has, self._places = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for side, count in enumerate(counts):
            order = torch.argsort(here[side], stable=True)
            orders.append(order[kept[here[side][order]]])
            self._has.append(torch.arange(int(count[kept].max())) < count[kept][:, None])
            tables.append(self._spread(orders[side], side))
            counted = one_hot(labels[side], K).cumsum(0) - 1  # the place of each in its block
            places = counted.gather(1, labels[side][:, None])[:, 0]
            self._places.append(self._spread((places if own is None else places[own[side]])[orders[side]], side))
        self._is_whole, (self.rows, self.cols) = own is None and all(map(Tensor.all, self._has)), tables
        """The coordinates of each block, (blocks, height) and (blocks, width)."""
        self.first, self.size = int(orders[0].min()), len(orders[0])
        """The outputs that the blocks add to."""
        self.inverse = torch.empty_like(orders[0])
        self.inverse[orders[0] - self.first] = self._has[0].flatten().nonzero().flatten()
        self.are_slices = all(torch.equal(own.flatten(), torch.arange(own.numel()) + own[0, 0]) for own in tables)

    def _spread(self, values: Tensor, side: int) -> Tensor:
        table = torch.zeros(self._has[side].shape, dtype=torch.int64)
        table[self._has[side]] = values
        return table

    def rank(self, ranks: tuple[int, ...]) -> int:
        """The most of a block."""
        return max(1, *(ranks[k] for k in self.kept))

    def run(self, rank: int, first_row: int, first_col: int) -> BlockRun:
        """The blocks, at these places of x and y."""
        return BlockRun(len(self.kept), self.rows.shape[1], self.cols.shape[1], rank, first_row, first_col, 0)

    def cut(self, ranks: tuple[int, ...]) -> Cut:
        """How to cut the factors of adapters with these ranks r_k, which are padded to one."""
        rank, starts = self.rank(ranks), list(accumulate(ranks, initial=0))
        if self._is_whole and len(set(ranks)) == 1:

            def views(part: SavedLayer) -> tuple[Tensor, Tensor]:
                A, B = part.A.view(len(ranks), rank, -1), part.B.view(-1, len(ranks), rank)
                return A.transpose(0, 1), B.permute(2, 1, 0) * part.scale

            return views
        kept, is_rank = torch.tensor(self.kept), torch.tensor([[j < ranks[k] for k in self.kept] for j in range(rank)])
        own = torch.tensor([[starts[k] + min(j, ranks[k] - 1) for k in self.kept] for j in range(rank)]).clamp(min=0)
        has_B, has_A = (has & is_rank[:, :, None] for has in self._has)
        is_full = bool(has_A.all() and has_B.all())
        of_B = self._places[0] * sum(ranks) + own[:, :, None]
        of_A = self._places[1] + own[:, :, None] * self._width

        def cut(part: SavedLayer) -> tuple[Tensor, Tensor]:
            A, B = torch.take(part.A, of_A), torch.take(part.B, of_B) * part.scale[kept]
            return (A, B) if is_full else (A * has_A, B * has_B)

        return cut


class LayerBlocks:
    """What adapters of a layer with equal partitions share, whatever their ranks: coordinates, and the blocks of W.

    Args:
        parts: An adapter with the blocks.
        sizes: This rank's outputs of each slice.
        own: None if there is one rank.
        weight: None without modulation.
        device: Where the coordinates are needed.
    """

    def __init__(
        self, parts: Parts, sizes: Sequence[int], own: Own | None, weight: Weight | None, device: torch.device
    ) -> None:
        starts = [start for start, part in zip(accumulate(sizes, initial=0), parts, strict=False) if part]
        of_slices = [None] * len(parts) if own is None else own()
        self.pieces = [Piece(part, mine) for part, mine in zip(parts, of_slices, strict=True) if part]
        are_slices, row, col = all(piece.are_slices for piece in self.pieces), 0, 0
        W, is_stored = (None, False) if weight is None else weight()
        self.runs, self.entries, orders = list[BlockRun](), list[Tensor](), list[Orders]()
        """One for each slice, and the blocks of W, (blocks, height, width); none without modulation."""
        for piece, start in zip(self.pieces, starts, strict=True):
            rows, cols, first_col = piece.rows + start, piece.cols, int(piece.cols[0, 0])
            self.runs.append(piece.run(0, row, first_col if are_slices else col))
            orders.append(Orders(rows.flatten(), piece.inverse + row, cols.flatten(), cols.flatten()))
            row, col = row + rows.numel(), col + cols.numel()
            if W is not None and are_slices:
                self.entries.append(piece.run(0, start + piece.first, first_col).of_slices(W))
            elif W is not None:
                self.entries.append(W[rows.to(W.device)[:, :, None], cols.to(W.device)[:, None]])
        if W is not None and not (are_slices and is_stored and (W.device.type != "cpu" or W.dtype.itemsize > 2)):
            dtype = product_dtype(W.dtype, W.device.type)  # else views of W; a CPU takes slices in 16 bits slowly
            self.entries = [part.to(dtype).contiguous() for part in self.entries]
        whole = Orders(*(torch.cat(side).to(device) for side in zip(*orders, strict=True)))
        covered = sum(piece.size for piece in self.pieces)
        spans = [(start + piece.first, piece.size) for start, piece in zip(starts, self.pieces, strict=True)]
        self.spans = spans if covered < sum(sizes) else None
        self.blocks = Blocks(whole.rows, whole.cols, len(whole.rows), whole, are_slices, (covered, len(whole.cols)))


class LayerStack:
    """The adapters of a layer that have the same blocks, ranks and modulation, by slot.

    Args:
        blocks: Theirs.
        parts: An adapter's factors; it is not written yet.
        room: For so many adapters there is memory from the start.
    """

    def __init__(self, blocks: LayerBlocks, parts: Parts, room: int) -> None:
        self.blocks, device = blocks, blocks.blocks.orders.rows.device
        slices = list(zip(blocks.pieces, blocks.runs, filter(None, parts), strict=True))
        self._cuts = [piece.cut(part.ranks) for piece, _, part in slices]
        self.runs = [replace(run, rank=piece.rank(part.ranks)) for piece, run, part in slices]
        shapes = [(room, 1, run.rank, run.count, size) for run in self.runs for size in (run.width, run.height)]
        empty = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes]
        self.factors: Gathered = list(zip(empty[::2], empty[1::2], strict=True))
        """A of each run and B with the scale in it, (places, 1, rank, blocks, width or height)."""
        self._rank = max(run.rank for run in self.runs) if blocks.entries else 0
        self._plan: Plan | None = None
        self._chosen: Gathered = ()
        """The factors of the slots of this plan, on a CPU: a GPU's memory is counted."""
        self.hold({})

    def hold(self, places: dict[int, int]) -> None:
        """Say which slots are taken, and where their factors are."""
        self.places, self.members, self._plan, self._chosen = places, frozenset(places.items()), None, ()

    def write(self, slot: int, parts: Parts) -> None:
        """Put an adapter into a slot, at the first free place; there is more room if need be."""
        room, others = len(self.factors[0][0]), {own: place for own, place in self.places.items() if own != slot}
        place = min({*range(len(others) + 1)} - {*others.values()})
        if place == room:
            more = [0, 0] * 4 + [0, max(1, room // 4)]
            self.factors = [(pad(A, more), pad(B, more)) for A, B in self.factors]
        for (A, B), cut, part in zip(self.factors, self._cuts, filter(None, parts), strict=True):
            A[place], B[place] = cut(part)
        self.hold(others | {slot: place})

    def add_to(self, output: Tensor, x: Tensor, rows: RowsBySlot) -> None:
        """Add to an output (rows, …, out_features) what each row's adapter makes of x (rows, …, in_features)."""
        plan, own = rows.plan(self.members, self._rank, x.shape[1:-1].numel(), x.device), self.blocks
        factors = self._chosen if self._plan is plan else of_slots(self.factors, plan.places)
        if x.device.type == "cpu":  # a plan stays while the same requests are decoded
            self._plan, self._chosen = plan, factors
        add_by_plan(output, x, plan, factors, Diagonal(own.blocks, self.runs, own.entries or None), own.spans)


class Slots:
    """The adapters in the slots of a layer: ``others`` are of other methods, ``stacks`` those of SMoA that are alike.

    Args:
        sizes: This rank's outputs of each slice of the layer.
        own: None if there is one rank of tensor parallelism.
        weight: Gives W.
        device: Where the layer is.
    """

    def __init__(self, sizes: Sequence[int], own: Own | None, weight: Weight, device: torch.device) -> None:
        self._sizes, self._own, self.weight, self._device = sizes, own, weight, device
        self.others: set[int] = set()
        self.stacks: dict[Hashable, LayerStack] = {}
        self._blocks: WeakValueDictionary[Hashable, LayerBlocks] = WeakValueDictionary()

    def reserve(self, parts: Parts, slots: int) -> None:
        """Take the memory of so many adapters with the blocks, ranks and modulation of this one."""
        self.stacks[_kind(parts)] = LayerStack(self._blocks_of(parts), parts, slots)

    def set(self, slot: int, parts: Parts) -> None:
        """Put an adapter's factors into a free slot."""
        key = _kind(parts)
        if key not in self.stacks:  # an empty stack waits for its like till another comes
            self.stacks = {known: each for known, each in self.stacks.items() if each.places}
            self.stacks[key] = LayerStack(self._blocks_of(parts), parts, 0)
        self.stacks[key].write(slot, parts)

    def _blocks_of(self, parts: Parts) -> LayerBlocks:
        """Those that another adapter has, or new ones."""
        is_modulated = any(part and part.modulation != "none" for part in parts)
        place = is_modulated, *(part and part.digest for part in parts)
        if (blocks := self._blocks.get(place)) is None:
            weight = self.weight if is_modulated else None
            self._blocks[place] = blocks = LayerBlocks(parts, self._sizes, self._own, weight, self._device)
        return blocks

    def reset(self, slot: int) -> None:
        """Free a slot."""
        self.others.discard(slot)
        for stack in (each for each in self.stacks.values() if slot in each.places):
            stack.hold({own: place for own, place in stack.places.items() if own != slot})

    def clear(self) -> None:
        """Forget all adapters, and with them the blocks of W."""
        self.stacks.clear()

    def add_to(self, output: Tensor, x: Tensor, rows: RowsBySlot) -> None:
        """Add to the output (tokens, out_features) what SMoA adapters make of the input x (tokens, in_features)."""
        for stack in self.stacks.values():
            if not stack.places.keys().isdisjoint(rows.of_slot):
                stack.add_to(output, x, rows)


def _kind(parts: Parts) -> Hashable:
    return tuple([part and part.kind for part in parts])
