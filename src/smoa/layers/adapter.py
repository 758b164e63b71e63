"""One adapter in one layer: its settings there, how and when its blocks are decided, and what follows from them.

Labels and block scales are buffers of the layer, because DeepSpeed saves and `torch.distributed.checkpoint` loads
parameters and buffers alone. `Derived` follows from them, is no buffer, and is made anew when they change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from tqdm.auto import tqdm

from smoa.config import SmoaConfig
from smoa.errors import PartitionError
from smoa.layers.distributed import awaits_process_group, from_rank_zero, onloaded, whole
from smoa.maths.blocks import UNDECIDED, Blocks, Orders, ascend, check_labels
from smoa.maths.kernels.autograd import is_transformed
from smoa.maths.scale import DEFAULT_SCALE, ModulationKind, ScaleKind, block_scale, rank_scale
from smoa.maths.spectrum import make_partition
from smoa.maths.stack import Side
from smoa.scores import cached_spectral_scores

Kinds = tuple[str, ScaleKind | None, ModulationKind, int]
"""Partition, scale and modulation of an adapter's config, and the seed of a random partition."""


def labels_and_scales(num_blocks: int, weight: Tensor, kinds: Kinds) -> tuple[Tensor, Tensor, Tensor]:
    """Row labels, column labels and block scales, on the CPU.

    Args:
        num_blocks: K.
        weight: W (m, n), for (m,), (n,) and (K,). Or W of all experts (experts, halves, m, n), for (G, m), (G, n)
            and (G, K), where G = experts·halves.
        kinds: What decides them.
    """
    partition, scale, modulation, seed = kinds
    generator = torch.Generator().manual_seed(seed)

    def decided(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = make_partition(matrix, num_blocks, partition, cached_spectral_scores, generator)
        scales = block_scale(scale or DEFAULT_SCALE, None if modulation == "none" else matrix, blocks)
        return blocks.row_labels.cpu(), blocks.col_labels.cpu(), scales

    if weight.dim() == 2:
        return decided(weight)
    matrices = [matrix for expert in weight for matrix in expert]  # views, which `flatten` may not give
    hidden = None if partition == "spectral" else True  # None: shown on a terminal only
    bar = tqdm(matrices, "SMoA partitions of experts", unit="matrix", delay=1, disable=hidden, leave=False)
    rows, cols, scales = zip(*map(decided, bar), strict=True)
    return torch.stack(rows), torch.stack(cols), torch.stack(scales)


class AdapterBuffers(nn.Module):
    """A tensor of each adapter, by the adapter's name, that moves with the layer and keeps its dtype.

    PEFT casts a `BufferDict` to the base layer's dtype, and moves it to the meta device together with a weight that
    accelerate offloads. This is none, and stays in memory then.
    """

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]  # none is None

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._buffers[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def write(self, name: str, values: Tensor) -> None:
        """Write in place, which a state dict sees, or keep a copy where there is nothing to write to."""
        known = self._buffers.get(name)
        if known is None or known.is_meta or known.shape != values.shape:
            self[name] = values.clone()
        else:
            known.copy_(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, tensor in self._buffers.items():
            moved = fn(tensor)  # type: ignore[arg-type]  # none is None
            if not moved.is_meta:
                self._buffers[name] = moved if moved.dtype == self[name].dtype else self[name].to(moved.device)
        return self


_BLOCKS: WeakValueDictionary[object, Blocks] = WeakValueDictionary()
"""The blocks of labels that adapters have now: those of one base share the sorted coordinates."""


def no_partition_any_more(adapter: str) -> PartitionError:
    """The error for labels that something has written to."""
    return PartitionError(
        f"the labels of {adapter} are no partition any more, as after averaging buffers; "
        "average parameters only: AveragedModel(model, use_buffers=False)"
    )


class Seen:
    """What a layer's tensors were when an adapter was derived from them, to tell in each call whether they still are.

    On a CPU that is what they hold: PyTorch doesn't count what is written through `.data`, or by a broadcast. To look
    elsewhere waits for the device, so there it is how often they were written to.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self.places = tensors, [each.data_ptr() for each in tensors]
        on_cpu = all(each.device.type == "cpu" and each.is_contiguous() for each in tensors)
        self.memory = [each.view(torch.uint8).numpy() for each in tensors] if on_cpu else None
        self.held = self._now()

    def lasts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and nothing was written to them."""
        are_same = all(map(operator.is_, tensors, self.tensors))
        if not are_same or [each.data_ptr() for each in tensors] != self.places:
            return False
        return self.held is not None and self.held == self._now()

    def _now(self) -> list[Any] | None:
        if self.memory is not None:
            return [each.tobytes() for each in self.memory]
        if any(map(Tensor.is_inference, self.tensors)):  # to which PyTorch counts no writes
            return None
        return [each._version for each in self.tensors]


@dataclass(eq=False)
class Derived:
    """What follows from an adapter's labels and block scales.

    Args:
        seen: Row labels, column labels and block scales, as the layer has them.
        labels: Copies of the labels, which the blocks have too.
        block_scale: The block scales in float32, which FSDP1 may have rounded in the layer.
        rank_scale: The block scale of the block that each rank belongs to, float32 (r,), or (G, r).
        blocks: The blocks of a layer's one matrix, or both sides of those of a stack.
        digest: The same for equal labels.
    """

    seen: Seen
    labels: tuple[Tensor, ...]
    block_scale: Tensor
    rank_scale: Tensor
    blocks: Blocks | tuple[Side, Side]
    digest: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, saved: tuple[Tensor, ...], ranks: Sequence[int], halves: int, known: Derived | None = None) -> Derived:
        """Sort the labels and compare them, which waits for their device. Called when they change, never in a step.

        Args:
            saved: As above.
            ranks: r_k of every block.
            halves: H of a stack.
            known: What followed from the tensors before; its block scales stay if they were rounded since.
        """
        rows, cols, scale = saved
        exact = known.block_scale if known is not None and known.has_scale(scale) else scale
        scale = exact.to(scale.device, torch.float32, copy=exact is scale)
        kept = Seen(saved), (rows := rows.clone(), cols := cols.clone()), scale, rank_scale(scale, ranks)
        if rows.dim() == 2:
            outputs, inputs = (Side.of(side.unflatten(0, (-1, halves)), len(ranks)) for side in (rows, cols))
            return cls(*kept, (outputs, inputs))
        shape = rows.shape[0], cols.shape[0]
        digest = 0 if rows.is_meta else hash(torch.cat([rows, cols]).cpu().numpy().tobytes())
        key = digest, *shape, rows.device, len(ranks)
        if (blocks := _BLOCKS.get(key)) is None:
            _BLOCKS[key] = blocks = Blocks(rows, cols, len(ranks), Orders.of(rows, cols), ascend(rows, cols), shape)
        return cls(*kept, blocks, digest)

    def is_of(self, saved: tuple[Tensor, ...], waits: bool = False) -> bool:
        """Whether it follows from these tensors: they are the same, or were written to in vain, as by DDP. With `waits`
        it looks at what they hold, wherever they are."""
        if (not waits or self.seen.memory is not None) and self.seen.lasts(saved):
            return True
        if is_transformed(*saved) or saved[0].device != self.labels[0].device or not self.has_scale(saved[2]):
            return False
        if is_equal := all(map(torch.equal, saved, self.labels)):
            self.seen = Seen(saved)
        return is_equal

    def has_scale(self, scale: Tensor) -> bool:
        """Whether block scales are these ones, or were before they were rounded."""
        own = self.block_scale
        return own.shape == scale.shape and torch.equal(own.to(scale.device, scale.dtype), scale)


@dataclass(eq=False)
class Adapter:
    """One adapter in one layer: its settings there, its blocks and block scales.

    Args:
        stores: Where the layer keeps row labels, column labels and block scales.
        name: The adapter's.
        config: Its settings.
        seed: Of a random partition.
        ranks: r_k of every block.
        alpha: ΔW is scaled by alpha / r.
        halves: H in a layer with a stack of matrices.
    """

    stores: tuple[AdapterBuffers, AdapterBuffers, AdapterBuffers]
    name: str
    config: SmoaConfig
    seed: int
    ranks: tuple[int, ...]
    alpha: float
    halves: int = 1

    def __post_init__(self) -> None:
        config = self.config
        self.kinds: Kinds = config.partition, config.scale, config.modulation, self.seed  # the config may change
        self.r, self.modulation = sum(self.ranks), config.modulation
        self.scaling = self.alpha / self.r
        """As configured; the layer's own `scaling` may have been changed since."""
        self.pending = True
        """Whether labels and scales are not decided yet: they will be loaded, or computed when they are needed."""
        self._derived: Derived | None = None

    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row labels, column labels and block scales, as they are stored."""
        name, (rows, cols, scale) = self.name, self.stores
        return rows._buffers[name], cols._buffers[name], scale._buffers[name]  # type: ignore[return-value]  # none is None

    def decide(self, row_labels: Tensor, col_labels: Tensor, block_scale: Tensor) -> None:
        """Write labels and scales."""
        for store, tensor in zip(self.stores, (row_labels, col_labels, block_scale), strict=True):
            store.write(self.name, tensor)
        self.pending = False
        self.derived()

    def prepare(self, layer: Any, defer: bool) -> None:
        """Make room for labels and scales in the layer, and decide them unless they will be loaded, or can't be yet."""
        device = torch.device("cpu") if layer.stored_weight().is_meta else layer.stored_weight().device
        rows, cols, scale = layer.saved_shapes(self.ranks)[2:]
        for store, shape in zip(self.stores[:2], (rows, cols), strict=True):
            store[self.name] = torch.full(shape, UNDECIDED, dtype=torch.uint8, device=device)
        self.stores[2][self.name] = torch.ones(scale, device=device, dtype=torch.float32)
        if defer:
            return
        for other in layer.adapters.values():
            same = other.config is self.config and other.kinds == self.kinds and len(other.ranks) == len(self.ranks)
            if same and not other.pending:  # TRL's reference, to which it copies factors alone
                self.decide(*other.saved())
                return
        if not awaits_process_group() and (parts := self._computed(layer)) is not None:
            self.decide(*parts)

    def decide_from(self, layer: Any) -> None:
        """Compute what is pending. Raises PartitionError if the base weight is on the meta device."""
        if not self.pending:
            return
        if self.is_valid():  # from a file, or from another process
            self.pending = False
        elif (parts := self._computed(layer)) is not None:
            self.decide(*parts)
        else:
            raise PartitionError("the base weight is on the meta device; load the weights before the adapter is used")

    def _computed(self, layer: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Labels and scales by rank 0's weight; None if that is on the meta device."""
        with onloaded([layer.get_base_layer()]), gather_params_ctx(layer.stored_weight()):  # for DeepSpeed ZeRO-3
            weight = None if layer.stored_weight().is_meta else whole(layer.pristine_weight())  # for FSDP2
            return from_rank_zero(
                lambda: None if weight is None else labels_and_scales(len(self.ranks), weight, self.kinds)
            )

    def is_valid(self) -> bool:
        """Whether the labels are there, and a partition."""
        rows, cols, _ = self.saved()
        if rows.is_meta:
            return False
        try:
            for labels in (*rows.view(-1, rows.shape[-1]), *cols.view(-1, cols.shape[-1])):
                check_labels(labels, len(self.ranks), "labels")
        except PartitionError:
            return False
        return True

    def look(self) -> None:
        """Derive anew what was loaded, moved or written to unseen. Labels that are no partition fail in a call."""
        with suppress(PartitionError):
            self.derived(waits=True)

    def derived(self, waits: bool = False) -> Derived:
        """What follows from labels and scales; made anew if they were replaced or written to (see `is_of`).

        Of labels that a transform (`torch.func`) has put in place for a call, nothing is kept. A compiled model doesn't
        look: labels don't change while it runs.
        """
        known, saved = self._derived, self.saved()
        rows, cols, scale = saved
        if known is not None and (torch.compiler.is_compiling() or rows.is_meta or known.is_of(saved, waits)):
            return known  # `is_meta`: offloaded
        if known is not None and is_transformed(*saved):
            blocks = known.blocks
            if isinstance(blocks, Blocks):
                blocks = Blocks(rows, cols, len(self.ranks), Orders.of(rows, cols), False, blocks.shape)
            return Derived(known.seen, (), scale, rank_scale(scale, self.ranks), blocks)
        if not (rows.is_meta or is_transformed(*saved) or self.is_valid()):
            raise no_partition_any_more("an adapter")
        with torch.inference_mode(False):  # what is made in inference mode can't be used in training
            self._derived = Derived.of(saved, self.ranks, self.halves, known)
        return self._derived
