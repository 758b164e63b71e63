"""SmoaConfig: what a user says about an adapter. It checks what it alone knows; the layer checks shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import PeftType

from .errors import ConfigError
from .modulation import Modulation, check_block_ranks, split_rank
from .spectrum import MAX_BLOCKS, PartitionKind

Bias = Literal["none", "all", "smoa_only"]


@dataclass
class SmoaConfig(PeftConfig):
    """Configuration of a SMoA adapter: `ΔW[I_k, J_k] = (α/r)·(B_k A_k) ⊙ W[I_k, J_k]` (arXiv:2605.21147).

    Trainable parameters of a layer: r(m+n)/K, 1/K of LoRA's at the same r.

    Args:
        r: Total rank budget, Σ r_k over the blocks.
        num_blocks: K, at most the smaller side of every adapted weight and at most 255.
        block_ranks: r_k of each block, summing to r; None splits r evenly, the remainder going to the first blocks.
        alpha: ΔW is scaled by alpha / r; None means alpha = r. Since ΔW is also scaled by |W|, which is about 0.02,
            alpha = r wants a learning rate 10 to 50 times LoRA's; alpha = 32·r works with ordinary ones.
        smoa_dropout: Dropout probability of the adapter's input.
        bias: Which biases train: "none", "all" or "smoa_only" (those of adapted layers).
        partition: How coordinates are assigned to blocks: by "spectral" score, "contiguous" or at "random".
        modulation: "hadamard" multiplies each block with the frozen weight, "none" does not.
        init_weights: True makes the fresh adapter a no-op (B = 0), False gives a visible random one, for tests.
        target_modules: As in LoRA: names, a regular expression, or "all-linear"; None takes the architecture's default.
        exclude_modules: Names or a regular expression of modules to leave alone.
        modules_to_save: Modules besides the adapter that are trained and saved whole.
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the layer list, with `layers_to_transform`.
        rank_pattern: r by module name or regular expression.
        alpha_pattern: alpha by module name or regular expression.
        fan_in_fan_out: True for layers that store (in_features, out_features), as GPT-2's Conv1D; set automatically.
        trainable_token_indices: Token embeddings that train besides, as in LoRA.

    Raises:
        ConfigError: every broken rule, all in one message.
    """

    r: int = field(default=32, metadata={"help": "Total rank budget, the sum of the blocks' ranks."})
    num_blocks: int = field(default=2, metadata={"help": "Number of aligned spectral blocks, K."})
    block_ranks: list[int] | None = field(default=None, metadata={"help": "Rank of each block; sums to r."})
    alpha: float | None = field(default=None, metadata={"help": "ΔW is scaled by alpha / r; None means alpha = r."})
    smoa_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    bias: Bias = field(default="none", metadata={"help": "Which biases train: none, all or smoa_only."})
    partition: PartitionKind = field(default="spectral", metadata={"help": "spectral, contiguous or random."})
    modulation: Modulation = field(default="hadamard", metadata={"help": "hadamard or none."})
    init_weights: bool = field(default=True, metadata={"help": "True: no-op at the start. False: random, for tests."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "r by module name."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "alpha by module name."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Weights are stored (in_features, out_features)."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings that train besides."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT leaves it without types
        self.peft_type = PeftType("SMOA")
        problems = self._problems()
        if problems:
            raise ConfigError("SmoaConfig: " + "; ".join(problems))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> SmoaConfig:
        """Read `adapter_config.json` of a folder or hub id.

        The labels of such an adapter come from its file, so a layer made from this config decomposes nothing unless
        it is used without a file having been loaded.
        """
        config: SmoaConfig = super().from_pretrained(*args, **kwargs)
        config.labels_follow = True
        return config

    labels_follow = False  # class attribute without annotation: not a field, so not saved

    def ranks(self, r: int) -> tuple[int, ...]:
        """Rank of each block of a layer whose total rank is r."""
        return tuple(self.block_ranks) if self.block_ranks is not None else split_rank(r, self.num_blocks)

    def _problems(self) -> list[str]:
        problems = [_int_problem("r", self.r), _int_problem("num_blocks", self.num_blocks, MAX_BLOCKS)]
        problems += [_int_problem(f"rank_pattern[{key!r}]", value) for key, value in self.rank_pattern.items()]
        problems += [_positive_problem(f"alpha_pattern[{key!r}]", value) for key, value in self.alpha_pattern.items()]
        problems.append(None if self.alpha is None else _positive_problem("alpha", self.alpha))
        for name, choices in (("bias", Bias), ("partition", PartitionKind), ("modulation", Modulation)):
            problems.append(_choice_problem(name, getattr(self, name), get_args(choices)))
        problems.append(_choice_problem("init_weights", self.init_weights, (True, False)))
        if not _is_number(self.smoa_dropout) or not 0 <= self.smoa_dropout < 1:
            problems.append(f"smoa_dropout={self.smoa_dropout!r} must be a number in [0, 1)")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append(f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            problems.append(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules to be a list of names, "
                f"not the regular expression {self.target_modules!r}"
            )
        found = [problem for problem in problems if problem]
        return found or self._block_rank_problems()

    def _block_rank_problems(self) -> list[str]:
        if self.block_ranks is None:
            return []
        if self.rank_pattern:
            return [
                "block_ranks and rank_pattern can't be combined: a pattern's r has no block_ranks; drop one of them"
            ]
        if not isinstance(self.block_ranks, (list, tuple)):
            return [f"block_ranks={self.block_ranks!r} must be a list of integers, one for each block"]
        try:
            check_block_ranks(tuple(self.block_ranks), self.r, self.num_blocks)
        except ConfigError as error:
            return [str(error)]
        return []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _int_problem(name: str, value: object, limit: int | None = None) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (limit or value):
        return None
    return f"{name}={value!r} must be a positive integer" + (f", at most {limit}" if limit else "")


def _positive_problem(name: str, value: object) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return None
    return f"{name}={value!r} must be a positive number"


def _choice_problem(name: str, value: object, choices: tuple[object, ...]) -> str | None:
    if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        return None
    return f"{name}={value!r} must be one of {', '.join(map(repr, choices))}"
