"""SmoaConfig: the settings of an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from smoa.errors import ConfigError
from smoa.kernels.factors import Initialization
from smoa.kernels.scale import DEFAULT_SCALE, ModulationKind, ScaleKind
from smoa.partition import MAX_BLOCKS, block_sizes
from smoa.spectrum import partition_kinds

Bias = Literal["none", "all", "smoa_only"]
Shape = tuple[int, int]
"""(out_features, in_features) of a weight."""
FORMAT = 1
"""`smoa_format` in a saved config, to be increased when an older smoa would read the adapter wrongly."""


@dataclass
class SmoaConfig(PeftConfig):
    """Configuration of a SMoA adapter: `ΔW[I_k, J_k] = (α/r)·(B_k A_k) ⊙ W[I_k, J_k]` (arXiv:2605.21147).

    Trainable parameters of a layer: r(m+n)/K, 1/K of LoRA's at the same r. As in every method of PEFT, the model holds
    this object, `model.peft_config[adapter_name]`, and PEFT fills in what you left out, such as target_modules.

    Args:
        r: Total rank, Σ r_k. It is split evenly over the blocks; the first ones get the remainder. The default of 16,
            with K = 2, trains as many parameters as LoRA's of 8.
        num_blocks: K, at most 255. A layer whose weight has a side shorter than K takes as many blocks as that side is
            long, and the ranks of the first of the K blocks. alpha / r stays the same.
        num_blocks_pattern: K by module name or regular expression, at most the smaller side of the weights it names.
        alpha: ΔW is scaled by alpha / r; None means alpha = r.
        use_rslora: Scale by alpha / √(r/K) instead, rsLoRA's at equal parameters. alpha = None then means r / K.
        smoa_dropout: Dropout probability of the adapter's input.
        bias: Biases to train: "none", "all" or "smoa_only" (those of adapted layers).
        scale: The part of ΔW's scale that comes from the weight. "lora" multiplies each block by 4 / rms(block), so
            you can keep LoRA's alpha / r. "block" and "layer" are 1 / rms of the block or of the layer's weight.
            "paper" leaves ΔW relative to the weight, whose entries are about 0.02, and needs other learning rates.
        partition: How to assign coordinates to blocks: by "spectral" score, "contiguous" or at "random", by the seed of
            `torch.manual_seed` and the module's name; or by a name that `smoa.register_partition` knows.
        modulation: "hadamard" multiplies each block by the frozen weight. "none", for ablations, does not.
        init_weights: True starts with B = 0 and "zero_A" with A = 0, so ΔW is zero. False makes a visible random
            update, for tests.
        target_modules: As in LoRA: names, a regular expression, or "all-linear". None uses the architecture's default.
        target_parameters: As in LoRA: names of parameters with a matrix for each expert of a mixture, such as
            "mlp.experts.gate_up_proj" and "mlp.experts.down_proj". Each expert's matrix, and gate and up each on its
            own, gets the method.
        exclude_modules: Names or a regular expression of modules not to adapt.
        modules_to_save: Modules to train and save whole, in addition to the adapter.
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the layer list, with `layers_to_transform`.
        rank_pattern: r by module name or regular expression.
        alpha_pattern: alpha by module name or regular expression.
        fan_in_fan_out: Weights are stored as (in_features, out_features), as in GPT-2's Conv1D. Set automatically.
        trainable_token_indices: Token embeddings to train, as in LoRA.
        ensure_weight_tying: As PEFT has it, for modules_to_save and trainable_token_indices.
        other_base: Load the adapter on a base of other weights than it was trained on.
        lora_alpha: LoRA's name for alpha.
        lora_dropout: LoRA's name for smoa_dropout.
        smoa_format: The format of a saved config. Leave it out.

    Raises:
        ConfigError: a setting has no such value.
    """

    r: int = 16
    num_blocks: int = 2
    num_blocks_pattern: dict[str, int] = field(default_factory=dict)
    alpha: float | None = None
    use_rslora: bool = False
    scale: ScaleKind = DEFAULT_SCALE
    smoa_dropout: float = 0.0
    bias: Bias = "none"
    partition: str = "spectral"
    modulation: ModulationKind = "hadamard"
    init_weights: Initialization = True
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    other_base: bool = False
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    smoa_format: int = 0
    """0 in a new config, FORMAT in a saved one."""

    def __post_init__(self, lora_alpha: float | None, lora_dropout: float | None) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT leaves it without types
        self.peft_type = PeftType("SMOA")
        self.was_saved = self.smoa_format > 0  # then its labels come from a file
        if self.smoa_format > FORMAT:
            raise ConfigError(
                f"SmoaConfig: smoa_format={self.smoa_format} was made by a newer smoa, and this one reads up to "
                f"{FORMAT}; run: pip install -U smoa"
            )
        self.smoa_format = FORMAT
        self.alpha = self.alpha if lora_alpha is None else lora_alpha
        self.smoa_dropout = self.smoa_dropout if lora_dropout is None else lora_dropout
        for name in ("target_modules", "exclude_modules"):
            given = getattr(self, name)
            setattr(self, name, set(given) if isinstance(given, list) else given)
        choices: dict[str, tuple[Any, ...]] = {
            "bias": get_args(Bias),
            "scale": get_args(ScaleKind),
            "modulation": get_args(ModulationKind),
            "init_weights": (True, False, "zero_A"),
        }
        if not self.was_saved:  # a saved one brings labels, by whatever function they were made
            choices["partition"] = partition_kinds()
        for name, valid in choices.items():
            if (given := getattr(self, name)) not in valid:
                raise ConfigError(f"SmoaConfig: {name}={given!r} must be one of {', '.join(map(repr, valid))}")
        if self.r < 1:
            raise ConfigError(f"SmoaConfig: r={self.r} must be at least 1")
        if not 1 <= self.num_blocks <= MAX_BLOCKS:
            raise ConfigError(f"SmoaConfig: num_blocks={self.num_blocks} must be between 1 and {MAX_BLOCKS}")
        for name in ("layers_to_transform", "layers_pattern"):  # PEFT's words
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if not isinstance(self.target_parameters, list | None):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def num_blocks_of(self, module: str, shape: Shape | None = None) -> int:
        """K of a module.

        Args:
            module: Name of the module.
            shape: (out_features, in_features). K is limited by its smaller side, unless `num_blocks_pattern` names the
                module.
        """
        given: int | None = by_pattern(self.num_blocks_pattern, module, None)
        if given is not None:
            return given
        return self.num_blocks if shape is None else min(self.num_blocks, *shape)

    def rank_of(self, module: str, shape: Shape | None = None) -> int:
        """Total rank of a module: that of as many blocks as it has, each of the rank that it would have among all."""
        r: int = by_pattern(self.rank_pattern, module, self.r)
        own, whole = self.num_blocks_of(module, shape), self.num_blocks_of(module)
        return r // whole * own + min(r % whole, own)

    def ranks_of(self, module: str = "", shape: Shape | None = None) -> tuple[int, ...]:
        """Rank of each block of a module. The default name matches no pattern."""
        return block_sizes(self.rank_of(module, shape), self.num_blocks_of(module, shape))

    def alpha_of(self, module: str, r: int, shape: Shape | None = None) -> float:
        """The alpha by which ΔW of a module is scaled as alpha / r. For use_rslora it is alpha·√(r·K)."""
        alpha: float | None = by_pattern(self.alpha_pattern, module, self.alpha)
        if self.use_rslora:
            K = self.num_blocks_of(module, shape)
            return (r / K if alpha is None else alpha) * math.sqrt(r * K)
        if alpha is None:
            return float(r)
        return alpha * (self.rank_of(module, shape) / self.rank_of(module))


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name matches, as PEFT matches them."""
    return patterns.get(get_pattern_key(list(patterns), module), default)
