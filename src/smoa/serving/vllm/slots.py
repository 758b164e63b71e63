"""The adapters in the slots of a layer of vLLM: each token is given what its own slot's adapter adds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from smoa.layers.rows import RowsBySlot
from smoa.serving.stack import LayerBlocks, LayerStack, Own, Parts, Weight


class Slots:
    """The adapters in the slots of a layer: ``lora`` are vLLM's own, ``stacks`` those of SMoA that are alike.

    Args:
        sizes: This rank's outputs of each slice of the layer.
        own: None if there is one rank of tensor parallelism.
        weight: Gives W.
        device: Where the layer is.
    """

    def __init__(self, sizes: Sequence[int], own: Own | None, weight: Weight, device: torch.device) -> None:
        self._sizes, self._own, self._weight, self._device = sizes, own, weight, device
        self.lora: set[int] = set()
        self.stacks: dict[Hashable, LayerStack] = {}
        self._room: dict[Hashable, int] = {}
        self._blocks: WeakValueDictionary[Hashable, LayerBlocks] = WeakValueDictionary()
        self.is_new = False
        """Whether an adapter took memory that was not reserved."""

    def reserve(self, parts: Parts, slots: int) -> None:
        """Keep room for so many adapters with the blocks, ranks and modulation of this one."""
        self._room[_kind(parts)] = slots
        self._stack(parts)

    def set(self, slot: int, parts: Parts) -> None:
        """Put an adapter's factors into a free slot."""
        self._stack(parts).write(slot, parts)

    def _stack(self, parts: Parts) -> LayerStack:
        key = _kind(parts)
        if key not in self.stacks:  # an empty stack waits for its like till another comes
            self.stacks = {known: each for known, each in self.stacks.items() if each.members or known in self._room}
            is_modulated = any(part and part.modulation != "none" for part in parts)
            place = is_modulated, *(part and part.digest for part in parts)
            if (blocks := self._blocks.get(place)) is None:
                weight = self._weight if is_modulated else None
                self._blocks[place] = blocks = LayerBlocks(parts, self._sizes, self._own, weight, self._device)
            self.stacks[key] = LayerStack(blocks, parts, self._room.get(key, 0))
            self.is_new |= key not in self._room
        return self.stacks[key]

    def reset(self, slot: int) -> None:
        """Free a slot."""
        self.lora.discard(slot)
        for stack in self.stacks.values():
            stack.members -= {slot}

    def clear(self) -> None:
        """Forget all adapters, and the weights that they multiply."""
        self.lora.clear()
        self.stacks.clear()

    def add_to(self, output: Tensor, x: Tensor, rows: RowsBySlot) -> None:
        """Add to the output (tokens, out_features) what SMoA adapters make of the input x (tokens, in_features)."""
        for stack in self.stacks.values():
            if not stack.members.isdisjoint(rows.of_slot):
                stack.add_to(output, x, rows)

    def nbytes(self, slots: int) -> int:
        """Of all that is kept, with so many slots."""
        blocks = {id(stack.blocks): stack.blocks.nbytes for stack in self.stacks.values()}
        return sum(blocks.values()) + sum(slots * stack.slot_bytes for stack in self.stacks.values())


def _kind(parts: Parts) -> Hashable:
    return tuple([part and part.kind for part in parts])
