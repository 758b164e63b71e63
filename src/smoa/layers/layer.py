"""State of an adapted layer: factors, labels and merged adapters."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from smoa.compat import integers_kept
from smoa.config.adapter_config import Shape, SmoaConfig
from smoa.layers.distributed import refuse_partitioned
from smoa.layers.partition import PartitionState, Pending
from smoa.layers.undo import DiagonalBlocks
from smoa.layers.weight_cache import WeightCache, tensor_state
from smoa.maths.blocks import check_num_blocks
from smoa.maths.factors import Factors, Initialization, factor_shapes, init_factors
from smoa.maths.kernels.plain import is_transformed
from smoa.maths.modulations import MODULATIONS, ModulationKind
from smoa.maths.update import Update

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

RANDOM_SIZE = 0.1
"""rms of ΔW relative to W for an adapter made with `init_weights=False`: visible, not huge."""


class SmoaLayer(PartitionState):
    """State of all SMoA adapters on one layer; everything except `base_layer` is keyed by adapter name.

    `smoa_A[name]` is a `Linear(⌈n/K⌉ → r)` and `smoa_B[name]` a `Linear(r → ⌈m/K⌉)`, both without bias. Only they, the
    labels and the block scales are saved.
    """

    generation_cache: Literal["blocks", "weights", "off"] = "blocks"
    """What `generate` keeps: see `smoa.keep_in_generate`."""
    converted_by_peft = True
    tied = False
    """Whether another layer has the same weight and the same adapters (`ensure_weight_tying`)."""
    training: bool
    adapter_layer_names: tuple[str, ...] = ("smoa_A", "smoa_B")
    other_param_names: tuple[str, ...] = (
        "r",
        "alpha",
        "scaling",
        "ranks",
        "modulation",
        "made_with",
        "pending_partition",
        "contiguous",
        "smoa_dropout",
        "smoa_row_labels",
        "smoa_col_labels",
        "smoa_block_scale",
        "smoa_orders",
        "smoa_scale_bits",
        "_derived_from",
    )

    def __init__(
        self, base_layer: nn.Module, fan_in_fan_out: bool = False, backend: QuantizationBackend | None = None
    ) -> None:
        PartitionState.__init__(self)
        self.base_layer = base_layer
        self.fan_in_fan_out = fan_in_fan_out
        self.quantization_backend = backend
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.modulation: dict[str, ModulationKind] = {}
        self.made_with: dict[str, dict[str, Any]] = {}  # settings of the config, which may be changed later
        self.smoa_dropout = nn.ModuleDict()
        self.smoa_A = nn.ModuleDict()
        self.smoa_B = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._pristine_blocks: dict[str, DiagonalBlocks] = {}  # of the merged adapters, by their names
        self.smoa_weight_cache: WeightCache | None = None
        self.out_features, self.in_features = self._weight_shape()

    def _weight_shape(self) -> Shape:
        return self.shape_of(self.get_base_layer())

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_features, in_features) of the matrix W in such a base layer, also while its weight is sharded."""
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        config: SmoaConfig,
        module: str = "",
        *,
        defer_partition: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Name of the adapter.
            config: The adapter's settings.
            module: Name of this layer in the model, for the patterns of the config.
            defer_partition: Don't decide the labels yet, because they are about to be loaded.

        Raises:
            PartitionError: K does not fit the layer, or the weight has NaN or infinite entries.
        """
        shape = (self.out_features, self.in_features)
        ranks = config.ranks_of(module, shape=shape)
        check_num_blocks(len(ranks), *shape)
        r = sum(ranks)
        alpha = config.alpha_of(module, r, shape)
        self.r[adapter_name], self.alpha[adapter_name], self.scaling[adapter_name] = r, alpha, alpha / r
        self.ranks[adapter_name], self.modulation[adapter_name] = ranks, config.modulation
        self.made_with[adapter_name] = config.made_with()
        self.smoa_dropout[adapter_name] = nn.Dropout(config.smoa_dropout) if config.smoa_dropout else nn.Identity()
        self._add_factors(adapter_name, config.init_weights)
        self._add_partition(adapter_name, self._pending(config, module), defer_partition)
        if config.init_weights is False:
            self.equalize_random_update(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _pending(self, config: SmoaConfig, module: str) -> Pending:
        return Pending(config.partition, config.modulation, config.scale_of(module))

    def _add_factors(self, adapter_name: str, init: Initialization) -> None:
        shape_A, shape_B = factor_shapes(self.out_features, self.in_features, self.ranks[adapter_name])
        A, B = nn.Linear(shape_A[1], shape_A[0], bias=False), nn.Linear(shape_B[1], shape_B[0], bias=False)
        with torch.no_grad():
            self._fill_factors(A.weight, B.weight, adapter_name, init)
        self.smoa_A[adapter_name], self.smoa_B[adapter_name] = A, B

    def _fill_factors(self, A: Tensor, B: Tensor, adapter_name: str, init: Initialization) -> None:
        sizes, relative_size = (self.out_features, self.in_features), RANDOM_SIZE / self.scaling[adapter_name]
        init_factors(A, B, sizes, self.ranks[adapter_name], init, relative_size)

    @torch.no_grad()
    def equalize_random_update(self, adapter_name: str) -> None:
        """Give the ΔW of random factors the same size for every scale."""
        self.smoa_B[adapter_name].weight.div_(self.rank_scale(adapter_name))  # type: ignore[operator]

    def follow(self, other: SmoaLayer, adapter_name: str) -> None:
        """Use another layer's factors, blocks and scales for an adapter. Both layers have one weight."""
        self.smoa_A[adapter_name], self.smoa_B[adapter_name] = other.smoa_A[adapter_name], other.smoa_B[adapter_name]
        if adapter_name not in other.pending_partition:
            self._set(adapter_name, other._saved(adapter_name))
            self.pending_partition.pop(adapter_name, None)
        self.tied = other.tied = True
        self._pristine_blocks = other._pristine_blocks  # whichever is merged first overwrites the weight of both

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        with self.exact_scales(), integers_kept(self, adapter_name):  # PEFT casts to the base layer's dtype
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def stored_weight(self) -> Tensor:
        """The base layer's weight as stored: transposed in a Conv1D, packed bytes in a quantized layer."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    def base_weight(self) -> Tensor:
        """The base layer's current weight, (out_features, in_features) for every kind of storage."""
        return as_matrix(refuse_partitioned(self.stored_weight()), self.fan_in_fan_out)

    def write_weight(self, matrix: Tensor) -> None:
        """Overwrite the base layer's weight by `matrix` (out_features, in_features), unless that is a view of it."""
        stored = self.stored_weight()
        if matrix.data_ptr() != stored.data_ptr():
            stored.copy_(as_stored(matrix, stored.shape, self.fan_in_fan_out))

    def pristine_weight(self) -> Tensor:
        """The base weight before any merge, (out_features, in_features); a copy only while adapters are merged."""
        return self.unmerged(self.base_weight())

    def unmerged(self, weight: Tensor) -> Tensor:
        """`weight` (out_features, in_features) as it was before any merge; a copy only while adapters are merged."""
        if not self._pristine_blocks:
            return weight
        weight = weight.clone()
        for blocks in self._pristine_blocks.values():
            blocks.write_to(weight)
        return weight

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A: (r, ⌈n/K⌉) and B: (⌈m/K⌉, r)."""
        return _linear_weight(self.smoa_A[adapter_name]), _linear_weight(self.smoa_B[adapter_name])

    def saved_shapes(self, adapter_name: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of A, B, row labels, column labels and block scales in an adapter's file."""
        of_factors = factor_shapes(self.out_features, self.in_features, self.ranks[adapter_name])
        return *of_factors, *self.partition_shapes(adapter_name)

    @property
    def matrix_count(self) -> int:
        """How many matrices W the layer has."""
        return 1

    def all_factors(self, adapter_name: str) -> list[Factors]:
        """The adapter's factors for each of the layer's matrices, as views."""
        return [self.update(adapter_name).factors]

    def update(self, adapter_name: str) -> Update:
        """The adapter's `Update`, which forms ΔW or applies it to x, given the pristine weight."""
        blocks = self.blocks(adapter_name)
        A, B = self.factors(adapter_name)
        ranks, scaling = self.ranks[adapter_name], self.scaling[adapter_name]
        factors = Factors(A, B, ranks, scaling, self.rank_scale(adapter_name), blocks)
        return Update(factors, MODULATIONS[self.modulation[adapter_name]])

    def parts(self, adapter_name: str) -> Iterator[tuple[str, Tensor, Update]]:
        """Every matrix that the adapter changes: its name within the layer, its pristine weight and its update."""
        yield "", self.pristine_weight(), self.update(adapter_name)

    def delta(self, adapter_name: str) -> Tensor:
        """Dense ΔW (out_features, in_features), float32 or wider, anchored on the pristine weight."""
        return self.update(adapter_name).delta(self.pristine_weight())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the shape in which the base layer stores its weight (PEFT's contract)."""
        return as_stored(self.delta(adapter), self.stored_weight().shape, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's own converter knows this kind of layer. `smoa.export.lora` knows more."""
        return self.converted_by_peft

    def open_cache(self, names: list[str], x: Tensor) -> WeightCache | None:
        """The cache for a call with these adapters, if one is open.

        Calls with active dropout, compiled models and transforms use none.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or (cache := self.smoa_weight_cache) is None:
            return None
        dropped = self.training and any(isinstance(self.smoa_dropout[name], nn.Dropout) for name in names)
        return None if dropped or cache.gave_up or is_transformed(x) else cache

    def state_of_update(self, names: list[str]) -> tuple[Hashable, ...]:
        """Changes when ΔW of one of these adapters does."""
        tensors = [tensor for name in names for tensor in (*self.factors(name), *self._saved(name))]
        return *(self.scaling[name] for name in names), *map(tensor_state, [self.stored_weight(), *tensors])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s to `scale` times its configured value α/r."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters by `scale`."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide s of the active adapters by `scale`; None restores the configured value."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = self.alpha[name] / self.r[name] if scale is None else self.scaling[name] / scale

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.smoa_A]


def as_matrix(stored: Tensor, fan_in_fan_out: bool) -> Tensor:
    """W (out_features, in_features) of a weight as stored: transposed in a Conv1D, with a kernel in a convolution."""
    return stored.T if fan_in_fan_out else stored.flatten(1)


def as_stored(matrix: Tensor, shape: Sequence[int], fan_in_fan_out: bool) -> Tensor:
    """The inverse of `as_matrix`, for a weight that is stored in `shape`."""
    return matrix.T if fan_in_fan_out else matrix.reshape(shape)


def _linear_weight(linear: nn.Module) -> Tensor:
    """Weight of a bias-free Linear, computed by its forward if a wrapper (FSDP) gathers the weight only there."""
    if type(linear) is nn.Linear:
        return refuse_partitioned(linear.weight)
    weight = next(linear.parameters())
    output: Tensor = linear(torch.eye(int(linear.in_features), device=weight.device, dtype=weight.dtype))  # type: ignore[arg-type]
    return output.T
