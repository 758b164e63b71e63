r"""An adapted layer: the state of its adapters and its forward.

One class does this for every kind of layer. A kind is a subclass that says what its matrix W is (`shape_of`), and how
ΔW is applied to an input (`branch_output`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smoa.adapter import Adapter, AdapterBuffers, Partition, make_blocks, make_loaded_blocks, save_exact_scales, twin_of
from smoa.adapter_names import CALL, OPEN, Call
from smoa.config import Shape, SmoaConfig
from smoa.distributed import awaits_process_group, linear_weight, onloaded_for, whole
from smoa.errors import UnsupportedModuleError
from smoa.kernels.autograd import is_transformed
from smoa.kernels.factors import Initialization, init_factors, saved_shapes
from smoa.kernels.one_product import Update
from smoa.kernels.scale import as_dtype
from smoa.merging import Merging, as_matrix, as_stored
from smoa.partition import UNDECIDED, Blocks, check_num_blocks
from smoa.route import Route, in_autocast_dtype, route_of

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

RANDOM_SIZE = 0.1
"""rms of ΔW relative to W for an adapter made with `init_weights=False`: visible, not huge."""


class SmoaLayer(nn.Module, Merging, BaseTunerLayer):
    """Adds `Σ x ΔWᵀ` of the active adapters to the base layer's output.

    All state except `base_layer` is keyed by adapter name. `smoa_A[name]` is a `Linear(⌈n/K⌉ → r)` and `smoa_B[name]` a
    `Linear(r → ⌈m/K⌉)`, both without bias. Only they, the labels, uint8 (m,) and (n,), and the block scales, float32
    (K,), are saved. The block scales are the part of s_k that comes from the weight. `adapters[name]` has the
    adapter's settings and what follows from labels and scales.

    A layer that holds G matrices of one shape, such as experts, stacks its factors: `Linear(⌈n/K⌉ → G·r)` and
    `Linear(G·r → ⌈m/K⌉)`, r ranks of the first matrix, then r of the second.

    Args:
        base_layer: The layer to adapt.
        adapter_name: Name of the first adapter.
        config: The adapter's settings.
        module: Name of this layer in the model, for the patterns of the config.
        fan_in_fan_out: Whether the weight is stored as (in_features, out_features).
        defer_partition: Don't decide the labels yet, because they are about to be loaded.
        backend: PEFT's quantization backend, if the weight is quantized.
    """

    generation_cache: Literal["blocks", "merged", "off"] = "blocks"
    """What `generate` keeps: see `smoa.keep_in_generate`."""
    halves = 1
    """How many matrices W each expert has, if the layer has a stack of them."""
    matrix_count: int | None = None
    """G, if the layer has a stack of matrices W."""
    adapter_layer_names: tuple[str, ...] = ("smoa_A", "smoa_B")
    other_param_names: tuple[str, ...] = (
        *("adapters", "scaling", "smoa_dropout"),
        *("smoa_row_labels", "smoa_col_labels", "smoa_block_scale"),
    )
    cast_input_dtype_enabled = True
    """What `peft.helpers.disable_input_dtype_casting` switches; factors keep a dtype of their own all the same."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SmoaConfig,
        module: str = "",
        fan_in_fan_out: bool = False,
        defer_partition: bool = False,
        backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = fan_in_fan_out
        self.quantization_backend = backend
        self.adapters: dict[str, Adapter] = {}
        self.scaling: dict[str, float] = {}
        self.smoa_dropout = nn.ModuleDict()
        self.smoa_A = nn.ModuleDict()
        self.smoa_B = nn.ModuleDict()
        self.smoa_row_labels = AdapterBuffers()
        self.smoa_col_labels = AdapterBuffers()
        self.smoa_block_scale = AdapterBuffers()
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = self._weight_shape()
        self.register_state_dict_post_hook(save_exact_scales)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(make_loaded_blocks)  # type: ignore[no-untyped-call]
        self.update_layer(adapter_name, config, module, defer_partition=defer_partition)

    def __repr__(self) -> str:
        return f"smoa.{super().__repr__()}"

    # What a kind of layer says.

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_features, in_features) of the matrix W in such a base layer, also while its weight is sharded."""
        raise NotImplementedError

    keeps_blocks = False
    """Whether the layer takes the routes "kept" and "shared"."""

    def fits_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """Whether W + ΔW may stand for W in the base layer's own operation on x, which nobody else sees or replaces."""
        return False

    def in_one_product(self, x: Tensor, adapter_name: str) -> Tensor:
        """The layer's output for x, with W + ΔW for W."""
        raise NotImplementedError

    def branch_output(self, x: Tensor, adapter_name: str, route: Route | None = None) -> Tensor:
        """What the adapter adds to the base layer's output for the input x; in training, dropout acts on x."""
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        """The layer below all tuner layers (PEFT's contract, in a tenth of its time, for each call asks)."""
        base = self._modules["base_layer"]
        while "base_layer" in base._modules:  # type: ignore[union-attr]
            base = base._modules["base_layer"]  # type: ignore[union-attr]
        return base  # type: ignore[return-value]

    def _weight_shape(self) -> Shape:
        return self.shape_of(self.get_base_layer())

    # Adding an adapter.

    def update_layer(
        self, adapter_name: str, config: SmoaConfig, module: str = "", *, defer_partition: bool = False
    ) -> None:
        """Add an adapter, from what the constructor takes."""
        shape = (self.out_features, self.in_features)
        ranks = config.ranks_of(module, shape=shape)
        check_num_blocks(len(ranks), *shape)
        seed = zlib.crc32(f"{torch.initial_seed()} {module}".encode())
        own = Adapter(config, module, seed, ranks, config.alpha_of(module, sum(ranks), shape))
        self.adapters[adapter_name] = own
        self.scaling[adapter_name] = own.scaling
        dropout = nn.Dropout(config.smoa_dropout) if config.smoa_dropout else nn.Identity()
        self.smoa_dropout[adapter_name] = dropout.train(self.training)  # a layer that evaluates may get an adapter
        of_A, of_B, *of_partition = saved_shapes(shape, ranks, self.matrix_count)
        A, B = nn.Linear(of_A[1], of_A[0], bias=False), nn.Linear(of_B[1], of_B[0], bias=False)
        with torch.no_grad():
            for part_A, part_B in zip(A.weight.split(own.r), B.weight.split(own.r, dim=1), strict=True):
                self._fill_factors(part_A, part_B, adapter_name, config.init_weights)
        self.smoa_A[adapter_name], self.smoa_B[adapter_name] = A, B
        weight = self.stored_weight()
        device = torch.device("cpu") if weight.is_meta else weight.device
        empty = (UNDECIDED, torch.uint8), (UNDECIDED, torch.uint8), (1, torch.float32)
        for store, (value, dtype), size in zip(self.partition_stores, empty, of_partition, strict=True):
            store[adapter_name] = torch.full(size, value, dtype=dtype, device=device)
        is_there = not weight.is_meta or "_hf_hook" in self.get_base_layer().__dict__  # accelerate's offloading
        has_twin = twin_of(self, own) is not None
        if has_twin or (is_there and not (defer_partition or awaits_process_group())):
            rank_scale = self.decided(adapter_name).rank_scale
            if config.init_weights is False:
                with torch.no_grad():  # a random ΔW has the same size for every scale
                    B.weight.div_(rank_scale.flatten())
        if weight.is_floating_point():
            A.to(weight.dtype), B.to(weight.dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _fill_factors(self, A: Tensor, B: Tensor, adapter_name: str, init: Initialization) -> None:
        sizes, relative_size = (self.out_features, self.in_features), RANDOM_SIZE / self.scaling[adapter_name]
        init_factors(A, B, sizes, self.adapters[adapter_name].ranks, init, relative_size)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the device of the base layer (PEFT's contract). A new one's factors have its dtype; those
        that are loaded keep theirs."""
        if adapter_name not in self.adapters:
            return
        weight = self.stored_weight()
        hook = self.get_base_layer().__dict__.get("_hf_hook") if weight.is_meta else None  # of accelerate's offloading
        device = torch.device(device or getattr(hook, "execution_device", None) or weight.device)
        for factor in (self.smoa_A[adapter_name], self.smoa_B[adapter_name]):
            if not any(parameter.is_meta for parameter in factor.parameters()):
                factor.to(device)
        if device.type != "meta":  # where accelerate offloads the weight
            for store in self.partition_stores:
                store[adapter_name] = store[adapter_name].to(device)

    # Blocks and block scales: decided at injection or at the first use, or loaded.

    @property
    def partition_stores(self) -> tuple[AdapterBuffers, AdapterBuffers, AdapterBuffers]:
        """Row labels, column labels and block scales of all adapters."""
        return self.smoa_row_labels, self.smoa_col_labels, self.smoa_block_scale

    def partition_of(self, adapter_name: str) -> Partition:
        """Row labels, column labels and block scales of an adapter, as they are saved."""
        rows, cols, scale = (store[adapter_name] for store in self.partition_stores)
        return rows, cols, scale

    def decided(self, adapter_name: str) -> Adapter:
        """The adapter with its blocks, on the device of its labels; made now if there are none.

        With several processes, rank 0 decides for all, so every rank must call this.
        """
        own = self.adapters[adapter_name]
        if torch.compiler.is_compiling() and own.blocks is not None:
            return own
        device = self.smoa_row_labels[adapter_name].device
        if own.labels is None or (own.labels[0].device != device and device.type != "meta"):  # meta: offloaded
            make_blocks(self, adapter_name)
        return own

    def set_partition(self, adapter_name: str, partition: Partition) -> None:
        """Put labels and scales in the place of an adapter's."""
        for store, part in zip(self.partition_stores, partition, strict=True):
            store[adapter_name] = part.to(store[adapter_name].device, copy=True)
        self.adapters[adapter_name].labels = None

    def _replicate_for_data_parallel(self) -> Self:
        raise UnsupportedModuleError(
            "torch.nn.DataParallel copies a model to other GPUs without what SMoA derives from labels; start one "
            "process for each GPU, with torchrun or accelerate launch, or make one GPU visible"
        )

    def blocks(self, adapter_name: str) -> Blocks:
        """The adapter's blocks, of a layer of one matrix."""
        return cast(Blocks, self.decided(adapter_name).blocks)

    # Weights and updates.

    def stored_weight(self) -> Tensor:
        """The base layer's weight as stored: transposed in a Conv1D, packed bytes in a quantized layer."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    def base_weight(self, number: int = 0) -> Tensor:
        """The current weight, or one of a stack, (out_features, in_features) for every kind of storage."""
        return as_matrix(whole(self.stored_weight()), self.fan_in_fan_out)

    def pristine_matrix(self, number: int) -> Tensor:
        """`pristine_weight`, or one of a stack."""
        weight = self.base_weight(number)
        if self.pristine is not None:
            weight = weight.clone()
            self.pristine.write_to(weight, number)
        return weight

    def pristine_weight(self) -> Tensor:
        """The base weight before any merge, (out_features, in_features); a copy only while adapters are merged."""
        return self.pristine_matrix(0)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A: (r, ⌈n/K⌉) and B: (⌈m/K⌉, r), of all matrices."""
        return linear_weight(self.smoa_A[adapter_name]), linear_weight(self.smoa_B[adapter_name])

    def update(self, adapter_name: str) -> Update:
        """The adapter's `Update`, which forms ΔW or applies it to x, given the pristine weight."""
        (A, B), own = self.factors(adapter_name), self.decided(adapter_name)
        blocks = cast(Blocks, own.blocks)
        return Update(A, B, own.ranks, self.scaling[adapter_name], own.rank_scale, blocks, own.modulation)

    def updates(self, adapter_name: str) -> list[Update]:
        """The adapter's `Update` of each matrix."""
        return [self.update(adapter_name)]

    def parts(self, adapter_name: str) -> Iterator[tuple[str, Tensor, Update]]:
        """Every matrix that the adapter changes: its name within the layer, its pristine weight and its update."""
        for number, update in enumerate(self.updates(adapter_name)):
            yield "", self.pristine_matrix(number), update

    def delta(self, adapter_name: str) -> Tensor:
        """Dense ΔW (out_features, in_features), float32 or wider, anchored on the pristine weight."""
        return self.update(adapter_name).delta(self.pristine_weight())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the shape in which the base layer stores its weight (PEFT's contract)."""
        return as_stored(self.delta(adapter), self.stored_weight().shape, self.fan_in_fan_out)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s to `scale` times its configured value α/r."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.adapters[adapter].scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters by `scale`."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide s of the active adapters by `scale`; None restores the configured value."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = self.adapters[name].scaling if scale is None else self.scaling[name] / scale

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.adapters]

    # Forward.

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base layer's output plus that of the active adapters; `adapter_names` selects one for each sample."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        call = Call(tuple(adapter_names)) if adapter_names is not None else CALL.get() if OPEN else None
        if call is not None:
            return self._forward_of(call, x, *args, **kwargs)
        active = [] if self.merged else self._present(self.active_adapters)
        routes = [route_of(self, x, name, alone=len(active) == 1) for name in active]
        if "one product" in routes:
            return self.in_one_product(x, active[0])
        result = self.base_layer(x, *args, **kwargs)
        with nullcontext() if "kept" in routes else onloaded_for(self, active):
            for name, route in zip(active, routes, strict=True):
                result = result + as_dtype(self.branch_output(x.to(result.device), name, route), result.dtype)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # for each batch of names it would compile again
    def _forward_of(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus that of each row's own adapter."""
        rows = call.rows(len(x))
        if call.trains and not (torch.is_grad_enabled() or call.is_computed_again):
            raise ValueError(
                "adapter_names: a reentrant checkpoint would compute again without them; use_reentrant=False"
            )
        if self.merged:
            raise ValueError(  # PEFT's words
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        of_slot = {slot: name for slot in rows.of_slot if (name := call.of_slot[slot]) in self.adapters}
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return self._add_mixed(result, x.to(result.device), call, of_slot)

    def _add_mixed(self, result: Tensor, x: Tensor, call: Call, of_slot: dict[int, str]) -> Tensor:
        """The base layer's output for x plus that of each row's adapter: `of_slot` are those that the layer has."""
        own, is_own = call.rows(len(x)).of_slot, False  # others may hold the base layer's output
        with onloaded_for(self, of_slot.values()):
            for slot, name in of_slot.items():
                rows = torch.tensor(own[slot], device=x.device)
                result, is_own = add_rows(result, rows, self.branch_output(x[rows], name), is_own), True
        return result

    def dropped(self, adapter_name: str) -> float:
        """The probability with which dropout acts on the adapter's input now."""
        dropout = self.smoa_dropout[adapter_name] if self.training else None
        return dropout.p if isinstance(dropout, nn.Dropout) else 0.0

    def branch_input(self, x: Tensor, adapter_name: str) -> Tensor:
        """What an adapter's branch is given for the layer's input x: in training dropout acts on it."""
        x = self.smoa_dropout[adapter_name](x) if self.training else x
        if self.adapters[adapter_name].modulation == "none":
            return self._cast_input_dtype(x, self.factors(adapter_name)[0].dtype)
        return in_autocast_dtype(x)


def of_base(name: str) -> Any:
    """An attribute of the base layer that models read, as Whisper reads the strides of its convolutions."""
    return property(lambda layer: getattr(layer.get_base_layer(), name))


def around_adapters(
    module: nn.Module, name: str = "", found: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without what adapters have in their layers, which may be much."""
    found = set() if found is None else found
    if module not in found:
        found.add(module)
        yield name, module
        for part, child in module.named_children():
            if part == "base_layer" or not isinstance(module, BaseTunerLayer):
                yield from around_adapters(child, f"{name}.{part}".removeprefix("."), found)


def smoa_layers(model: nn.Module) -> dict[str, SmoaLayer]:
    """The adapted layers of a model, by name."""
    return {name: module for name, module in around_adapters(model) if isinstance(module, SmoaLayer)}


def add_rows(result: Tensor, rows: Any, output: Tensor, is_own: bool) -> Tensor:
    """`result` plus an output for some rows: in place if nobody else holds it (`is_own`)."""
    output, in_place = output.to(result.dtype), is_own and not is_transformed(output)
    return result.index_add_(0, rows, output) if in_place else result.index_add(0, rows, output)
