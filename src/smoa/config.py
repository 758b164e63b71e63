"""SmoaConfig: the settings of an adapter, and the rules by which they are checked, without a model."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field, fields
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key

from smoa.errors import ConfigError, UnknownSettingError, named, nearest
from smoa.maths.blocks import MAX_BLOCKS
from smoa.maths.factors import Initialization, split_rank
from smoa.maths.scale import DEFAULT_SCALE, ModulationKind, ScaleKind
from smoa.maths.spectrum import partition_problems

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
            long, and the ranks of the first of the K blocks. alpha / r stays the same. One warning names these layers.
        num_blocks_pattern: K by module name or regular expression, at most the smaller side of the weights it names.
        alpha: ΔW is scaled by alpha / r; None means alpha = r.
        use_rslora: Scale by alpha / √(r/K) instead, rsLoRA's at equal parameters. alpha = None then means r / K.
        smoa_dropout: Dropout probability of the adapter's input.
        bias: Biases to train: "none", "all" or "smoa_only" (those of adapted layers).
        scale: The part of ΔW's scale that comes from the weight. "lora" multiplies each block by 4 / rms(block), so
            you can keep LoRA's alpha / r and learning rate. "block" and "layer" are 1 / rms of the block or of the
            layer's weight. "paper" leaves ΔW relative to the weight, whose entries are about 0.02: alpha = r then needs
            10 to 33 times LoRA's learning rate, and alpha = 32·r one of about 1e-2. None means "lora".
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
        ensure_weight_tying: In adapters of older versions: all layers of one weight have the same factors. They load,
            for inference; new ones are refused.
        other_base: Load the adapter on a base of other weights than it was trained on. Saved only if set.
        quantized_base: The adapter was made on a quantized base, so plain weights may differ from that as much as
            quantizing changes them. Set automatically; saved only if set.
        lora_alpha: LoRA's name for alpha.
        lora_dropout: LoRA's name for smoa_dropout.

    Raises:
        ConfigError: at least one rule is broken; the message lists all of them.
    """

    r: int = 16
    num_blocks: int = 2
    num_blocks_pattern: dict[str, int] = field(default_factory=dict)
    alpha: float | None = None
    use_rslora: bool = False
    scale: ScaleKind | None = None
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
    quantized_base: bool = False

    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    # In files:
    smoa_format: InitVar[int] = 0

    def __post_init__(self, lora_alpha: float | None, lora_dropout: float | None, smoa_format: int) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT leaves it without types
        self.peft_type = PeftType("SMOA")
        if fits(smoa_format, int) and smoa_format > FORMAT:  # alone: other settings may mean something else there
            raise ConfigError(
                f"SmoaConfig: smoa_format={smoa_format} was made by a newer smoa, and this one reads up to {FORMAT}; "
                "run: pip install -U smoa"
            )
        self.scale = DEFAULT_SCALE if self.scale is None else self.scale
        for name in (each.name for each in fields(self)):
            setattr(self, name, _as_json(getattr(self, name)))
        problems = list(value_problems("smoa_format", smoa_format, int))
        problems += self._rename("alpha", "lora_alpha", lora_alpha)
        problems += self._rename("smoa_dropout", "lora_dropout", lora_dropout)
        # a saved one may load labels that a function elsewhere has made
        problems += config_problems(self) or ([] if smoa_format else partition_problems(self.partition))
        if problems:
            raise ConfigError("SmoaConfig: " + "; ".join(problems))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)

    def __setattr__(self, name: str, value: Any) -> None:
        own = {"lora_alpha": "alpha", "lora_dropout": "smoa_dropout"}.get(name)  # which are read as None
        if own is None or value is not None:
            super().__setattr__(own or name, value)

    def _rename(self, ours: str, theirs: str, value: float | None) -> list[str]:
        """Take a value given under LoRA's name. Return its problems."""
        problems = list(value_problems(theirs, value, float | None))
        if value is None or problems:
            return problems
        given = getattr(self, ours)
        if given and given != value:
            return [f"{ours}={given!r} and {theirs}={value!r} name the same setting; drop {theirs}"]
        setattr(self, ours, value)
        return []

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> SmoaConfig:
        """Read `adapter_config.json` from a folder or the Hub. As in PEFT, another method's file gives its own config.

        Raises:
            ConfigError: the file breaks a rule.
        """
        with named(Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)):
            config: SmoaConfig = super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The settings and, as in a saved config, `smoa_format`."""
        rare = "other_base", "quantized_base"
        known = {name: value for name, value in super().to_dict().items() if name not in rare or value}
        return {**known, "smoa_format": FORMAT}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`.

        Raises:
            ConfigError: PEFT has just written the weights as a pickle, which smoa would not read.
        """
        pickle, weights = (Path(save_directory, name) for name in (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME))
        if pickle.is_file() and not (weights.is_file() and weights.stat().st_mtime >= pickle.stat().st_mtime):
            raise ConfigError(
                f"{pickle}: is a pickle, which can run code when it is read, so smoa would not load it; save without "
                "safe_serialization=False"
            )
        super().save_pretrained(str(save_directory), **kwargs)

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
        return split_rank(self.rank_of(module, shape), self.num_blocks_of(module, shape))

    def alpha_of(self, module: str, r: int, shape: Shape | None = None) -> float:
        """The alpha by which ΔW of a module is scaled as alpha / r. For use_rslora it is alpha·√(r·K)."""
        alpha: float | None = by_pattern(self.alpha_pattern, module, self.alpha)
        if self.use_rslora:
            K = self.num_blocks_of(module, shape)
            return (r / K if alpha is None else alpha) * math.sqrt(r * K)
        if alpha is None:
            return float(r)
        return alpha * (self.rank_of(module, shape) / self.rank_of(module))


_init = SmoaConfig.__init__


@wraps(_init)
def _init_with_known(self: SmoaConfig, *args: Any, **given: Any) -> None:
    """Refuse settings that there are not, such as LoRA's own, by name."""
    known = SmoaConfig.__dataclass_fields__
    if unknown := [name for name in given if name not in known]:
        raise UnknownSettingError(
            f"SmoaConfig.__init__() got an unexpected keyword argument '{unknown[0]}'{nearest(unknown[0], known)}; "
            f"leave out what SMoA has no counterpart of: {', '.join(unknown)}"
        )
    _init(self, *args, **given)


SmoaConfig.__init__ = _init_with_known  # type: ignore[method-assign]


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name matches, as PEFT matches them."""
    return patterns.get(get_pattern_key(list(patterns), module), default)


def _as_json(value: object) -> object:
    """Convert collections that JSON lacks to lists."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, (tuple, range)) else value


# Rules for the values, alone and together.

Rule = tuple[Callable[[Any], bool], str]

MAX_RANK = 1 << 20
"""More than any weight's smaller side, beyond which a rank adds nothing."""
COUNT: Rule = (lambda n: 1 <= n <= MAX_RANK, f"a positive integer, at most {MAX_RANK}")
BLOCKS: Rule = (lambda n: 1 <= n <= MAX_BLOCKS, f"a positive integer, at most {MAX_BLOCKS}")
POSITIVE: Rule = (lambda x: 0 < x <= sys.float_info.max, "a positive number")
SHARE: Rule = (lambda p: 0 <= p < 1, "a number in [0, 1)")
INDEX: Rule = (lambda n: n >= 0, "an index from 0 on")
RULES: dict[str, Rule] = {
    "r": COUNT,
    "rank_pattern": COUNT,
    "num_blocks": BLOCKS,
    "num_blocks_pattern": BLOCKS,
    "alpha": POSITIVE,
    "alpha_pattern": POSITIVE,
    "lora_alpha": POSITIVE,
    "smoa_dropout": SHARE,
    "lora_dropout": SHARE,
    "layers_to_transform": INDEX,
    "trainable_token_indices": INDEX,
    "smoa_format": INDEX,
}
"""The range of a value, or of each value in a list or mapping."""
EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern")
PATTERNS = ("rank_pattern", "alpha_pattern", "num_blocks_pattern")
CHECKED_BY_PEFT = ("task_type", "peft_type", "peft_version")


_hints_of = cache(get_type_hints)


def config_problems(config: Any) -> list[str]:
    """All problems of single values or, if there are none, of combinations."""
    hints = _hints_of(config.__class__)
    names = [field.name for field in fields(config) if field.name not in CHECKED_BY_PEFT]
    problems = [problem for name in names for problem in value_problems(name, getattr(config, name), hints[name])]
    return problems or list(_combination_problems(config))


def value_problems(name: str, value: Any, hint: Any) -> Iterator[str]:
    """The problems of one value: its type or, if that is right, its range and syntax."""
    if not fits(value, hint):
        yield f"{name}={shortened(value)} must be {in_words(hint)}"
        return
    if name in RULES:
        holds, wanted = RULES[name]
        yield from (f"{place}={entry!r} must be {wanted}" for place, entry in _entries(name, value) if not holds(entry))
    for expression in _expressions(name, value):
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError):
            yield f"{name}: {shortened(expression)} is not a regular expression"


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The numbers in a value and their places."""
    if isinstance(value, (list, Mapping)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _entries(f"{name}[{key!r}]", inner)
    elif value is not None:
        yield name, value


def _expressions(name: str, value: Any) -> list[str]:
    if name in PATTERNS:
        return [*value, *(rf"(.*\.)?({key})$" for key in value)]  # alone, and as PEFT uses it
    if name not in EXPRESSIONS or value is None:
        return []
    if isinstance(value, str):
        return [value]
    return list(value) if name == "layers_pattern" else []  # lists of modules are plain names


def _combination_problems(config: Any) -> Iterator[str]:
    if config.layers_pattern and config.layers_to_transform is None:
        yield f"layers_pattern={config.layers_pattern!r} has no effect without layers_to_transform"
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        yield (
            f"layers_to_transform={config.layers_to_transform!r} needs target_modules to be a list of names, "
            f"not the regular expression {config.target_modules!r}"
        )


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the annotated type. An int is also a float; a bool is neither."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """The annotated type, for an error message: "list[str] or str or null"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    return "null" if hint is NoneType else str(hint) if inner else str(hint.__name__)


def shortened(value: object) -> str:
    """The value as text, cut after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
