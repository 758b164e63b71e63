"""The adapters in the slots of a layer of vLLM: each token is given what its own slot's adapter adds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from smoa.layers.rows import RowsBySlot
from smoa.maths.kernels.shared import diagonal_of
from smoa.serving.stack import LayerStack, Parts


class Slots:
    """The adapters in the slots of a layer: ``lora`` are vLLM's own, ``stacks`` those of SMoA that are alike, with the
    blocks of the weight that they multiply."""

    def __init__(self) -> None:
        self.lora: set[int] = set()
        self.stacks: dict[Hashable, tuple[LayerStack, list[Tensor]]] = {}

    @torch.inference_mode()  # vLLM calls it within and without
    def set(self, slot: int, parts: Parts, sizes: Sequence[int], weight: Callable[[], Tensor]) -> None:
        """Put an adapter into a free slot.

        Args:
            slot: Its number.
            parts: The adapter's factors.
            sizes: out_features of each slice of the layer.
            weight: Gives W (out_features, in_features). Called if no adapter with these blocks and ranks was here.
        """
        key = tuple(part and (part.ranks, part.modulation, part.digest) for part in parts)
        if key not in self.stacks:  # an empty stack waits for its like till another comes
            self.stacks = {known: each for known, each in self.stacks.items() if each[0].members}
            W = weight()
            stack = LayerStack(parts, sizes, W.device, torch.float32)
            entries = [] if stack.modulation == "none" else diagonal_of(stack.blocks, stack.runs, W)
            entries = [part.contiguous() for part in entries]  # no view, which would keep all of W
            self.stacks[key] = stack, entries
        self.stacks[key][0].write(slot, parts)

    def reset(self, slot: int) -> None:
        """Free a slot."""
        self.lora.discard(slot)
        for stack, _ in self.stacks.values():
            stack.reset(slot)

    def clear(self) -> None:
        """Forget all adapters, and the weights that they multiply."""
        self.lora.clear()
        self.stacks.clear()

    def add_to(self, output: Tensor, x: Tensor, rows: RowsBySlot) -> None:
        """Add to the output (tokens, out_features) what SMoA adapters make of the input x (tokens, in_features)."""
        for stack, entries in self.stacks.values():
            if not stack.members.isdisjoint(rows.of_slot):
                stack.add_to(output, x, rows, entries)
