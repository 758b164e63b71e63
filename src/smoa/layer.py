"""The adapted layer: it remembers factors, labels and merged state; the maths is elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .autograd import fused_linear, hadamard_branch
from .config import SmoaConfig
from .errors import MergeError, PartitionError
from .merging import DiagonalBlocks
from .modulation import BlockLayout, Modulation, delta_weight, init_factors, low_rank_branch
from .spectrum import UNDECIDED, PartitionKind, SpectralPartition, check_num_blocks, make_partition

RANDOM_SIZE = 0.1
"""rms of ΔW relative to W of an adapter made with `init_weights=False`: visible, not huge."""
FUSED_MIN_TOKENS = 64
"""Without gradients, fewer tokens than this are cheaper apart than forming W + ΔW (measured: docs/experiment-log.md)."""


class SmoaLayer(BaseTunerLayer):
    """State of all SMoA adapters on one layer; everything but `base_layer` is keyed by adapter name.

    `smoa_A[name]` is a `Linear(⌈n/K⌉ → r)`, `smoa_B[name]` a `Linear(r → ⌈m/K⌉)`, both without bias, and the labels are
    uint8 buffers (in_features,) and (out_features,): that is all that is saved.
    """

    adapter_layer_names: tuple[str, ...] = ("smoa_A", "smoa_B")
    other_param_names: tuple[str, ...] = (
        "r",
        "alpha",
        "scaling",
        "layout",
        "modulation",
        "pending_partition",
        "smoa_dropout",
        "smoa_row_labels",
        "smoa_col_labels",
    )

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False) -> None:
        self.base_layer = base_layer
        self.fan_in_fan_out = fan_in_fan_out
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.layout: dict[str, BlockLayout] = {}
        self.modulation: dict[str, Modulation] = {}
        self.pending_partition: dict[str, PartitionKind] = {}
        self.smoa_dropout = nn.ModuleDict()
        self.smoa_A = nn.ModuleDict()
        self.smoa_B = nn.ModuleDict()
        self.smoa_row_labels = BufferDict(persistent=True)
        self.smoa_col_labels = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._pristine_blocks: list[DiagonalBlocks] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        config: SmoaConfig,
        r: int,
        alpha: float,
        *,
        defer_partition: bool = False,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            defer_partition: The labels are about to be loaded: decide them only if the adapter is used before.

        Raises:
            PartitionError: K doesn't fit the layer.
        """
        check_num_blocks(config.num_blocks, self.out_features, self.in_features)
        layout = BlockLayout(self.out_features, self.in_features, config.ranks(r))
        self.r[adapter_name], self.alpha[adapter_name], self.scaling[adapter_name] = r, alpha, alpha / r
        self.layout[adapter_name], self.modulation[adapter_name] = layout, config.modulation
        self.smoa_dropout[adapter_name] = nn.Dropout(config.smoa_dropout) if config.smoa_dropout else nn.Identity()
        self._add_factors(adapter_name, zero_B=config.init_weights)
        self._add_labels(adapter_name, config.partition, defer_partition)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _add_factors(self, adapter_name: str, zero_B: bool) -> None:
        layout = self.layout[adapter_name]
        A = nn.Linear(layout.shape_A[1], layout.rank, bias=False)
        B = nn.Linear(layout.rank, layout.shape_B[0], bias=False)
        with torch.no_grad():
            init_factors(
                A.weight, B.weight, layout, zero_B=zero_B, relative_size=RANDOM_SIZE / self.scaling[adapter_name]
            )
        self.smoa_A[adapter_name], self.smoa_B[adapter_name] = A, B

    def _add_labels(self, adapter_name: str, kind: PartitionKind, defer: bool) -> None:
        device = self.get_base_layer().weight.device
        self.smoa_row_labels[adapter_name] = _undecided(self.out_features, device)
        self.smoa_col_labels[adapter_name] = _undecided(self.in_features, device)
        self.pending_partition[adapter_name] = kind
        if not defer and device.type != "meta":
            self.decide_partition(adapter_name)

    def decide_partition(self, adapter_name: str) -> None:
        """Compute the labels of an adapter unless they have been computed or loaded already."""
        kind = self.pending_partition.get(adapter_name)
        if kind is None:
            return
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        if rows.device.type == "meta" or self.get_base_layer().weight.device.type == "meta":
            raise PartitionError("the base weight is on the meta device; load the weights before the adapter is used")
        if (rows == UNDECIDED).any() or (cols == UNDECIDED).any():
            partition = self._known_partition(adapter_name, kind) or self._compute_partition(adapter_name, kind)
            rows.copy_(partition.row_labels)
            cols.copy_(partition.col_labels)
        del self.pending_partition[adapter_name]

    def _known_partition(self, adapter_name: str, kind: PartitionKind) -> SpectralPartition | None:
        return None

    def _compute_partition(self, adapter_name: str, kind: PartitionKind) -> SpectralPartition:
        return make_partition(self.pristine_weight(), self.layout[adapter_name].num_blocks, kind)

    def partition(self, adapter_name: str) -> SpectralPartition:
        """The adapter's partition; computed now if nothing has decided it yet."""
        self.decide_partition(adapter_name)
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        return SpectralPartition(rows, cols, self.layout[adapter_name].num_blocks)

    def base_weight(self) -> Tensor:
        """The base layer's weight as it stands, (out_features, in_features) whatever its storage."""
        weight = self.get_base_weight()
        return weight.T if self.fan_in_fan_out else weight

    def pristine_weight(self) -> Tensor:
        """The base weight as it was before any merge, (out_features, in_features); not a copy unless merged."""
        weight = self.base_weight()
        if not self._pristine_blocks:
            return weight
        weight = weight.clone()
        for blocks in self._pristine_blocks:
            blocks.write_to(weight)
        return weight

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A: (r, ⌈n/K⌉) and B: (⌈m/K⌉, r)."""
        return _linear_weight(self.smoa_A[adapter_name]), _linear_weight(self.smoa_B[adapter_name])

    def delta(self, adapter_name: str) -> Tensor:
        """Dense ΔW, (out_features, in_features), float32 or wider, anchored on the pristine weight."""
        A, B = self.factors(adapter_name)
        ranks, modulation = self.layout[adapter_name].ranks, self.modulation[adapter_name]
        weight, scaling = self.pristine_weight(), self.scaling[adapter_name]
        return delta_weight(weight, A, B, self.partition(adapter_name), ranks, scaling, modulation)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the orientation in which the base layer stores its weight (PEFT's contract)."""
        return self.delta(adapter).T if self.fan_in_fan_out else self.delta(adapter)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: ΔW is additive."""
        return True

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s to `scale` times its configured value alpha / r."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters by `scale`."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide s of the active adapters by `scale`; None puts the configured value back."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = self.alpha[name] / self.r[name] if scale is None else self.scaling[name] / scale

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.smoa_A]


class Linear(nn.Module, SmoaLayer):
    """SMoA on a `torch.nn.Linear` or a transformers `Conv1D`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SmoaConfig,
        r: int,
        alpha: float,
        fan_in_fan_out: bool = False,
        defer_partition: bool = False,
    ) -> None:
        super().__init__()
        SmoaLayer.__init__(self, base_layer, fan_in_fan_out)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, alpha, defer_partition=defer_partition)

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """`W + Σ ΔW` of the named adapters on the pristine W, rounded once, (out_features, in_features)."""
        pristine = self.pristine_weight()
        total = sum((self.delta(name) for name in adapter_names), torch.zeros((), device=pristine.device))
        return (total + pristine).to(pristine.dtype)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise MergeError if merging these adapters gives NaN or infinite weights; changes nothing."""
        names = self._present(self.active_adapters if adapter_names is None else adapter_names)
        if not torch.isfinite(self.merged_weight([*self.merged_adapters, *names])).all():
            raise MergeError(
                f"merging {', '.join(names)} gives NaN or infinite weights; the adapter is broken or overflows "
                f"{self.base_weight().dtype}, nothing was merged"
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by `W + Σ ΔW`, keeping W's diagonal blocks (1/K of it) on the CPU for `unmerge`.

        Args:
            safe_merge: Raise MergeError instead of writing NaN or infinite weights.
            adapter_names: Adapters to merge besides those merged already; None means the active ones.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        merged = self.merged_weight([*self.merged_adapters, *names])
        pristine = self.pristine_weight()
        partitions = [self.partition(name) for name in names]
        self._pristine_blocks += [DiagonalBlocks.read_from(pristine, partition) for partition in partitions]
        self.base_weight().copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the pristine weight back, bit for bit."""
        weight = self.base_weight()
        for blocks in self._pristine_blocks:
            blocks.write_to(weight)
        self._pristine_blocks.clear()
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """`base_layer(x) + Σ x ΔWᵀ` of the active adapters; `adapter_names` picks one adapter for each sample."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [] if self.merged else self._present(self.active_adapters)
        if len(active) == 1 and self._can_fuse(x, active[0]):
            return self._fused_forward(x, active[0])
        result = self.base_layer(x, *args, **kwargs)
        for name in active:
            result = result + self.branch_output(x, name).to(result.dtype)
        return result

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names names {len(adapter_names)} adapters for {len(x)} inputs; give one each")
        if self.merged:
            raise ValueError("adapter_names can't be used while adapters are merged; call unmerge_adapter first")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in self._present(sorted(set(adapter_names))):
            chosen = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            result = result.index_add(0, chosen, self.branch_output(x[chosen], name).to(result.dtype))
        return result

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`x ΔWᵀ`, the adapter's contribution to the output; dropout acts on x when training."""
        self.decide_partition(adapter_name)
        x = self.smoa_dropout[adapter_name](x)
        A, B = self.factors(adapter_name)
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        layout, scaling = self.layout[adapter_name], self.scaling[adapter_name]
        if self.modulation[adapter_name] == "none":
            return low_rank_branch(self._cast_input_dtype(x, A.dtype), A, B, rows, cols, layout, scaling)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return hadamard_branch(x, A, B, self.base_weight(), rows, cols, layout.ranks, scaling)

    def _can_fuse(self, x: Tensor, adapter_name: str) -> bool:
        base = self.base_layer
        weight = getattr(base, "weight", None)
        if type(base) not in (nn.Linear, Conv1D) or _is_instrumented(base) or not isinstance(weight, Tensor):
            return False
        dropout = self.smoa_dropout[adapter_name]
        if self.modulation[adapter_name] == "none" or (isinstance(dropout, nn.Dropout) and self.training):
            return False
        wide = weight.dtype in (torch.float32, torch.float64) and weight.dtype == x.dtype
        if not wide or weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return False
        return torch.is_grad_enabled() or x.shape[:-1].numel() >= FUSED_MIN_TOKENS

    def _fused_forward(self, x: Tensor, adapter_name: str) -> Tensor:
        self.decide_partition(adapter_name)
        A, B = (factor.to(x.dtype) for factor in self.factors(adapter_name))
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        ranks, scaling = self.layout[adapter_name].ranks, self.scaling[adapter_name]
        weight, bias = self.base_weight(), self.get_base_layer().bias
        return fused_linear(x, A, B, weight, bias, rows, cols, ranks, scaling)

    def __repr__(self) -> str:
        return f"smoa.{super().__repr__()}"


def _undecided(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), UNDECIDED, dtype=torch.uint8, device=device)


def _linear_weight(linear: nn.Module) -> Tensor:
    """Weight of a bias-free Linear, through its forward where a wrapper (FSDP) gathers the weight only there."""
    if type(linear) is nn.Linear:
        return linear.weight
    eye = torch.eye(linear.in_features, device=next(linear.parameters()).device)
    output: Tensor = linear(eye)
    return output.T


def _is_instrumented(module: nn.Module) -> bool:
    """True when a forward hook or a replaced forward (as accelerate's offloading) must see the base layer's call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
