"""One adapter in one layer: its settings there, its labels and scales as stored, and the blocks made of them.

Labels and block scales are buffers of the layer, so that everything that saves or broadcasts a model takes them along.
The blocks are made of them once: at injection, after a load, or at the first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils.integrations import gather_params_ctx
from torch import Tensor
from tqdm.auto import tqdm

from smoa.config import SmoaConfig
from smoa.distributed import from_rank_zero, onloaded, whole, why_not_plain
from smoa.errors import AdapterFileError, PartitionError, named
from smoa.kernels.scale import block_scale, rank_scale, scale_of
from smoa.kernels.stack import Side
from smoa.partition import UNDECIDED, Blocks, check_labels
from smoa.scores import cached_spectral_scores
from smoa.spectrum import make_partition

TOLERANCE = 0.1
"""By how much the rms of a block may be off from the one that an adapter was trained on. Quantizing changes it too:
NF4, FP4 and int4 by 1.5 %, int3 by 5 %."""

Partition = tuple[Tensor, Tensor, Tensor]
"""Row labels uint8 (m,), column labels uint8 (n,) and block scales float32 (K,); of a stack (G, m), (G, n), (G, K)."""


class AdapterBuffers(BufferDict):
    """A tensor of each adapter, by its name, that moves with the layer and keeps its dtype.

    PEFT casts a `BufferDict`, and accelerate moves it to the meta device with an offloaded weight; this one stays.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self._loaded: dict[str, Tensor] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._buffers[name] = tensor  # `register_buffer` takes no name of an attribute, such as "keys"

    def take_loaded(self) -> dict[str, Tensor]:
        """What state dicts have brought since the last call, by adapter; the buffer may have rounded it (FSDP1)."""
        loaded, self._loaded = self._loaded, {}
        return loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, tensor in self._buffers.items():
            if tensor is not None and not (moved := fn(tensor)).is_meta:
                self._buffers[name] = tensor.to(moved.device)  # `to_empty` would leave no labels
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._loaded |= {name: state_dict[prefix + name] for name in self if prefix + name in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(eq=False)
class Adapter:
    """One adapter in one layer.

    Args:
        config: Its settings.
        module: Name of the layer in the model.
        seed: Of a random partition.
        ranks: r_k of every block.
        alpha: ΔW is scaled by alpha / r.
    """

    config: SmoaConfig
    module: str
    seed: int
    ranks: tuple[int, ...]
    alpha: float
    blocks: Blocks | tuple[Side, Side] | None = None
    """The blocks of a layer's one matrix, or both sides of those of a stack; None while there are none."""
    labels: tuple[Tensor, Tensor] | None = None
    """Copies of the labels that the blocks are made of."""
    block_scale: Tensor = None  # type: ignore[assignment]  # set with the blocks, as what follows
    """c_k of every block, float32 (K,) or (G, K), as it was decided or loaded."""
    rank_scale: Tensor = None  # type: ignore[assignment]
    """c_k of the block that each rank belongs to, float32 (r,) or (G, r)."""

    def __post_init__(self) -> None:
        self.r, self.modulation = sum(self.ranks), self.config.modulation
        self.cut = self.config.partition, len(self.ranks)  # the config may change
        self.scaling = self.alpha / self.r
        """As configured; the layer's own `scaling` may have been changed since."""

    def take_blocks(self, partition: Partition, halves: int, others: Iterable[Adapter]) -> None:
        """Take the blocks of these labels: new ones, or those of another adapter with equal labels. By one object a
        batch with adapters for each row knows what takes one product.

        Raises:
            PartitionError: the labels are no partition.
        """
        rows, cols, scale = partition
        if (other := next((each for each in others if each.has_labels(rows, cols, len(self.ranks))), None)) is not None:
            self.labels, self.blocks = other.labels, other.blocks
        else:
            self.labels = rows.clone(), cols.clone()  # a load writes into the buffers, and others share these
            if rows.dim() == 1:
                self.blocks = Blocks(*self.labels, len(self.ranks))
            else:
                for side in (*rows, *cols):
                    check_labels(side, len(self.ranks), "labels")
                outputs, inputs = (Side.of(side.unflatten(0, (-1, halves)), len(self.ranks)) for side in self.labels)
                self.blocks = outputs, inputs
        self.block_scale = scale.to(torch.float32, copy=True)
        self.rank_scale = rank_scale(self.block_scale, self.ranks)

    def has_labels(self, rows: Tensor, cols: Tensor, num_blocks: int) -> bool:
        """Whether it has blocks of these labels, on their device, and as many."""
        if self.labels is None or len(self.ranks) != num_blocks or self.labels[0].device != rows.device:
            return False
        return torch.equal(self.labels[0], rows) and torch.equal(self.labels[1], cols)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def make_blocks(layer: Any, adapter_name: str, loaded: Partition | None = None) -> None:
    """Make the blocks of an adapter in a layer from what a state dict brought, or the buffers hold, or W decides now.

    Raises:
        PartitionError: the labels are no partition, or the weight has NaN or infinite entries.
        AdapterFileError: the adapter was trained on another weight.
    """
    own, partition = layer.adapters[adapter_name], loaded or layer.partition_of(adapter_name)
    with named(own.module), torch.inference_mode(False):  # what is made in it can't be used in training
        is_loaded = own.labels is None
        if (partition[0] == UNDECIDED).all():  # a single one is damage
            layer.set_partition(adapter_name, _decided(layer, own))
            partition, is_loaded = layer.partition_of(adapter_name), False
        elif not is_loaded:  # the labels have moved, and the scale in the buffer may be rounded
            partition = *partition[:2], own.block_scale.to(partition[0].device)
        own.take_blocks(partition, layer.halves, [each for each in layer.adapters.values() if each.labels])
        if is_loaded and why_not_plain(layer) in (None, "quantized") and layer.smoa_B[adapter_name].weight.any():
            rows, cols, scale = (part.reshape(-1, part.shape[-1])[0] for part in partition)
            check_base(own.config, (rows, cols, scale), lambda: layer.pristine_matrix(0))


def make_loaded_blocks(layer: Any, incompatible_keys: object = None) -> None:
    """A hook after a load: make the blocks of labels that a state dict has brought; a compiled model would not."""
    rows, cols, scale = (store.take_loaded() for store in layer.partition_stores)
    for name in rows.keys() & cols.keys() & scale.keys():
        own, device = layer.adapters[name], layer.smoa_row_labels[name].device
        own.labels = None
        if not (rows[name] == UNDECIDED).all() and device.type != "meta":
            labels = rows[name].to(device, torch.uint8), cols[name].to(device, torch.uint8)
            make_blocks(layer, name, (*labels, scale[name].to(device)))


def save_exact_scales(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A hook of a save: write block scales as they were trained with, for FSDP1 may have rounded the buffers."""
    for name, own in layer.adapters.items():
        key = f"{prefix}smoa_block_scale.{name}"
        if own.labels is not None and key in state_dict and state_dict[key].dtype != own.block_scale.dtype:
            state_dict[key] = own.block_scale


def twin_of(layer: Any, own: Adapter) -> str | None:
    """Another adapter of a layer with the same config. TRL makes one as its reference, and copies factors alone."""
    decided = ((name, each) for name, each in layer.adapters.items() if each.labels)
    return next((name for name, each in decided if each.config is own.config and each.cut == own.cut), None)


def _decided(layer: Any, own: Adapter) -> Partition:
    """Labels and scales of a twin, or by rank 0's weight."""
    if (twin := twin_of(layer, own)) is not None:
        found: Partition = layer.partition_of(twin)
        return found
    stored = layer.stored_weight()
    with onloaded([layer.get_base_layer()]), gather_params_ctx(stored):  # for DeepSpeed ZeRO-3
        if layer.stored_weight().is_meta:
            raise PartitionError("the base weight is on the meta device; load the weights before it is used")
        weight = whole(layer.pristine_weight())  # for FSDP2
        return from_rank_zero(lambda: decided_partition(len(own.ranks), weight, own.config, own.seed))


def decided_partition(num_blocks: int, weight: Tensor, config: SmoaConfig, seed: int) -> Partition:
    """Labels and block scales by the weight, on the CPU.

    Args:
        num_blocks: K.
        weight: W (m, n), or W of all experts (experts, halves, m, n), which gives those of G = experts·halves matrices.
        config: What decides them.
        seed: Of a random partition.
    """
    generator = torch.Generator().manual_seed(seed)

    def decided(matrix: Tensor) -> Partition:
        blocks = make_partition(matrix, num_blocks, config.partition, cached_spectral_scores, generator)
        anchor = None if config.modulation == "none" else matrix
        scale = block_scale(config.scale, anchor, blocks)
        return blocks.row_labels.cpu(), blocks.col_labels.cpu(), scale

    if weight.dim() == 2:
        return decided(weight)
    matrices = [matrix for expert in weight for matrix in expert]  # views, which `flatten` may not give
    bar = tqdm(matrices, "SMoA partitions of experts", unit="matrix", delay=1, disable=None, leave=False)
    rows, cols, scales = zip(*map(decided, bar), strict=True)
    return torch.stack(rows), torch.stack(cols), torch.stack(scales)


def check_base(config: SmoaConfig, partition: Partition, weight: Callable[[], Tensor]) -> None:
    """Raise AdapterFileError if the first block of a weight has another size than the one that an adapter was trained
    on: ΔW is a product with W, and means nothing on another. The saved block scales are inverse sizes.

    Args:
        config: The adapter's.
        partition: Labels and block scales of this weight, as they were saved.
        weight: Gives the pristine W (out_features, in_features).
    """
    kind = config.scale
    if config.modulation == "none" or kind == "paper" or config.other_base:
        return
    W, (*labels, scale) = weight(), partition
    if kind != "layer":
        rows, cols = ((side == 0).nonzero()[:, 0].to(W.device) for side in labels)
        W = W[rows[:, None], cols]  # 1/K² of it
    off = abs(float(scale[0]) / scale_of(kind, W) - 1)
    if not off <= TOLERANCE:
        base = config.base_model_name_or_path
        raise AdapterFileError(
            f"the adapter was trained on another base{f', {base}' if base else ''}: the size (rms) of a block is off "
            f"by {off:.0%}; load that base, or set other_base=True in the adapter's config to load it all the same"
        )
