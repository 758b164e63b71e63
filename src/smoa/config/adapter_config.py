"""SmoaConfig: what a user says about an adapter. It checks what it alone knows; the layer checks shapes."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType
from peft.utils.other import get_pattern_key

from smoa.atomic import write_whole
from smoa.config.rules import Bias, config_problems, value_problems
from smoa.errors import ConfigError
from smoa.maths.factors import Initialization, split_rank
from smoa.maths.modulations import ModulationKind
from smoa.maths.scale import ScaleKind
from smoa.maths.spectrum import PartitionKind


@dataclass
class SmoaConfig(PeftConfig):
    """Configuration of a SMoA adapter: `ΔW[I_k, J_k] = (α/r)·(B_k A_k) ⊙ W[I_k, J_k]` (arXiv:2605.21147).

    Trainable parameters of a layer: r(m+n)/K, 1/K of LoRA's at the same r.

    Args:
        r: Total rank budget, Σ r_k over the blocks.
        num_blocks: K, at most the smaller side of every adapted weight and at most 255.
        num_blocks_pattern: K by module name or regular expression.
        blocks_from_spectrum: Choose the K of each layer that `num_blocks_pattern` does not name, in proportion to the
            effective rank of its weight, with `num_blocks` for the mean. r and alpha follow K, so that a block's rank,
            ΔW's scale and the layer's parameters stay. The adapter's own config, `model.peft_config["default"]`, has
            the choices in `num_blocks_pattern`.
        block_ranks: r_k of each block, summing to r; None splits r evenly, the remainder going to the first blocks.
        alpha: ΔW is scaled by alpha / r; None means alpha = r. Since ΔW is also scaled by |W|, which is about 0.02,
            alpha = r wants a learning rate 10 to 50 times LoRA's, alpha = 32·r one of about 1e-2.
        smoa_dropout: Dropout probability of the adapter's input.
        bias: Which biases train: "none", "all" or "smoa_only" (those of adapted layers).
        scale: The part of ΔW's scale that comes from the weight: "paper" leaves ΔW relative to the weight; "layer" and
            "block" divide by the rms of each layer's weight, or of each of its blocks, so that alpha means what it does
            in LoRA.
        normalize_anchor: The name that 0.1 gave to `scale="layer"`.
        partition: How coordinates are assigned to blocks: by "spectral" score, "contiguous" or at "random".
        modulation: "hadamard" multiplies each block with the frozen weight, "none" does not, "noise" takes random
            numbers of the weight's norm in its place: to measure what the weight's own entries are worth.
        init_weights: True makes the fresh adapter a no-op (B = 0), and so does "zero_A" (A = 0, B random); False gives
            a visible random one, for tests.
        target_modules: As in LoRA: names, a regular expression, or "all-linear"; None takes the architecture's default.
        exclude_modules: Names or a regular expression of modules to leave alone.
        modules_to_save: Modules besides the adapter that are trained and saved whole.
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the layer list, with `layers_to_transform`.
        rank_pattern: r by module name or regular expression.
        alpha_pattern: alpha by module name or regular expression.
        fan_in_fan_out: True for layers that store (in_features, out_features), as GPT-2's Conv1D; set automatically.
        trainable_token_indices: Token embeddings that train besides, as in LoRA.
        normalized_alpha: Alpha by module name, in adapters of smoa 0.1 with `normalize_anchor`.
        save_id: Made for each adapter and saved in both of its files, so that files of two adapters are told apart.
        spectrum_blocks: K by module name in adapters of smoa 0.1: entries of `num_blocks_pattern`.
        settings_digest: Ignored: in adapters of smoa 0.1.
        weights_digest: Ignored: in adapters of smoa 0.1.

    Raises:
        ConfigError: every broken rule, all in one message.
    """

    r: int = field(default=32, metadata={"help": "Total rank budget, the sum of the blocks' ranks."})
    num_blocks: int = field(default=2, metadata={"help": "Number of aligned spectral blocks, K."})
    num_blocks_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "num_blocks by module name."})
    blocks_from_spectrum: bool = field(default=False, metadata={"help": "Choose each layer's K by its spectrum."})
    block_ranks: list[int] | None = field(default=None, metadata={"help": "Rank of each block; sums to r."})
    alpha: float | None = field(default=None, metadata={"help": "ΔW is scaled by alpha / r; None means alpha = r."})
    normalize_anchor: bool = field(default=False, metadata={"help": "Divide alpha by the rms of each weight."})
    scale: ScaleKind = field(default="paper", metadata={"help": "paper, layer or block: what ΔW is relative to."})
    smoa_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    bias: Bias = field(default="none", metadata={"help": "Which biases train: none, all or smoa_only."})
    partition: PartitionKind = field(default="spectral", metadata={"help": "spectral, contiguous or random."})
    modulation: ModulationKind = field(default="hadamard", metadata={"help": "hadamard, none or noise."})
    init_weights: Initialization = field(
        default=True, metadata={"help": "True: B = 0. zero_A: A = 0. False: a random update, for tests."}
    )
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

    normalized_alpha: dict[str, float] = field(
        default_factory=dict, metadata={"help": "alpha by module, in adapters of 0.1."}
    )
    save_id: str | None = field(default=None, metadata={"help": "The same in both files of a saved adapter."})

    spectrum_blocks: InitVar[dict[str, int] | None] = None
    settings_digest: InitVar[object] = None
    weights_digest: InitVar[object] = None

    def __post_init__(
        self, spectrum_blocks: dict[str, int] | None, settings_digest: object, weights_digest: object
    ) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT leaves it without types
        self.peft_type = PeftType("SMOA")
        self._make_savable()
        problems = [*self._absorb(spectrum_blocks), *config_problems(self)]
        if problems:
            raise ConfigError("SmoaConfig: " + "; ".join(problems))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if (self.base_model_name_or_path or "").startswith("~"):
            self.base_model_name_or_path = str(Path(str(self.base_model_name_or_path)).expanduser())

    def _make_savable(self) -> None:
        for name in (each.name for each in fields(self)):
            value, ordered = getattr(self, name), name == "block_ranks"
            if isinstance(value, dict):
                setattr(self, name, {key: _as_json(inner, ordered) for key, inner in value.items()})
            else:
                setattr(self, name, _as_json(value, ordered))

    def _absorb(self, spectrum_blocks: dict[str, int] | None) -> list[str]:
        """Put the choices of smoa 0.1 where they are now; the problems that they have."""
        problems = list(value_problems("spectrum_blocks", spectrum_blocks, dict[str, int] | None))
        if spectrum_blocks and not problems:
            if self.blocks_from_spectrum is not True:
                return ["spectrum_blocks has no effect without blocks_from_spectrum"]
            if isinstance(self.num_blocks_pattern, dict):
                self.num_blocks_pattern = {**self.num_blocks_pattern, **spectrum_blocks}
        return problems

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> SmoaConfig:
        """Read `adapter_config.json` of a folder or hub id, as PEFT does: another method's gives that method's config.

        Raises:
            ConfigError: the file breaks a rule.
        """
        try:
            config: SmoaConfig = super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs)
        except ConfigError as error:
            folder = Path(pretrained_model_name_or_path, subfolder or "")
            raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from None
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, whole or not at all. The home folder in the path of a local base becomes `~`."""
        saved = copy.copy(self)
        saved.base_model_name_or_path = _without_home(self.base_model_name_or_path)
        with tempfile.TemporaryDirectory() as room:
            super(SmoaConfig, saved).save_pretrained(room, **kwargs)
            write_whole(Path(save_directory, CONFIG_NAME), Path(room, CONFIG_NAME).read_bytes())

    def num_blocks_of(self, module: str) -> int:
        """K of the module of that name."""
        return self.chosen_blocks_of(module) or self.num_blocks

    def chosen_blocks_of(self, module: str) -> int | None:
        """K of the module of that name by `num_blocks_pattern`, None if that does not name it."""
        if self.blocks_from_spectrum and module in self.num_blocks_pattern:  # one of hundreds, looked up at once
            return self.num_blocks_pattern[module]
        found: int | None = _by_pattern(self.num_blocks_pattern, module, None)
        return found

    def rank_of(self, module: str) -> int:
        """Total rank of the module of that name."""
        r: int = _by_pattern(self.rank_pattern, module, self.r)
        return r // self.num_blocks * self.num_blocks_of(module) if self.blocks_from_spectrum else r

    def ranks_of(self, module: str = "", r: int | None = None) -> tuple[int, ...]:
        """Rank of each block of the module of that name, by default of one that no pattern names; r is their sum."""
        if self.block_ranks is not None:
            return tuple(self.block_ranks)
        return split_rank(self.rank_of(module) if r is None else r, self.num_blocks_of(module))

    def alpha_of(self, module: str, r: int) -> float:
        """Alpha of the module of that name, whose total rank is r."""
        if module in self.normalized_alpha:
            return self.normalized_alpha[module]
        alpha: float | None = _by_pattern(self.alpha_pattern, module, self.alpha)
        if alpha is None:
            return float(r)
        num_blocks = self.num_blocks_of(module) if self.blocks_from_spectrum else self.num_blocks
        return alpha * num_blocks / self.num_blocks


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return patterns.get(get_pattern_key(list(patterns), module), default)


def _as_json(value: object, ordered: bool) -> object:
    """Lists in the place of the collections that JSON lacks; of sets only where order has no meaning."""
    if isinstance(value, (set, frozenset)) and not ordered:
        return sorted(value, key=str)
    return list(value) if isinstance(value, (tuple, range)) else value


def _without_home(name: str | None) -> str | None:
    """The name or path of a model with the home folder, which tells who the user is, as `~`."""
    home = Path("~").expanduser()
    if name is None or home == Path(home.anchor) or not Path(name).is_relative_to(home):
        return name
    return "~/" + Path(name).relative_to(home).as_posix()
