"""SmoaConfig: what a user says about an adapter. It checks what it alone knows; the layer checks shapes."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key

from smoa.atomic import write_whole
from smoa.config.rules import Bias, value_problems
from smoa.config.types import make_savable, type_problems
from smoa.errors import AdapterFileError, ConfigError
from smoa.files.adapter_folder import find_weights, largest_rank, saved_digest
from smoa.files.digest import settings_digest
from smoa.maths.factors import Initialization, split_rank
from smoa.maths.modulations import ModulationKind
from smoa.maths.scale import ScaleKind
from smoa.maths.spectrum import PartitionKind

T = TypeVar("T")


@dataclass
class SmoaConfig(PeftConfig):
    """Configuration of a SMoA adapter: `ΔW[I_k, J_k] = (α/r)·(B_k A_k) ⊙ W[I_k, J_k]` (arXiv:2605.21147).

    Trainable parameters of a layer: r(m+n)/K, 1/K of LoRA's at the same r.

    Args:
        r: Total rank budget, Σ r_k over the blocks.
        num_blocks: K, at most the smaller side of every adapted weight and at most 255.
        num_blocks_pattern: K by module name or regular expression.
        blocks_from_spectrum: Choose each layer's K in proportion to the effective rank of its weight, with `num_blocks`
            for the mean, and r and alpha with it, so that a block's rank, ΔW's scale and the layer's parameters stay.
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
        normalized_alpha: Alpha by module name, written by `normalize_anchor`.
        spectrum_blocks: K by module name, written by `blocks_from_spectrum`.
        settings_digest: Written when saved, checked when read: a damaged or edited `adapter_config.json` is refused.
        weights_digest: Written when saved with weights, checked when those are loaded.

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
        default_factory=dict, metadata={"help": "alpha by module, from normalize_anchor."}
    )
    spectrum_blocks: dict[str, int] = field(
        default_factory=dict, metadata={"help": "num_blocks by module, from blocks_from_spectrum."}
    )
    settings_digest: str | None = field(default=None, metadata={"help": "Of the settings above, when saved."})
    weights_digest: str | None = field(default=None, metadata={"help": "Of the tensors it was saved with."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT leaves it without types
        self.peft_type = PeftType("SMOA")
        make_savable(self)
        problems = type_problems(self) or value_problems(self)
        if problems:
            raise ConfigError("SmoaConfig: " + "; ".join(problems))
        if self.settings_digest not in (None, self._settings_digest()):
            raise ConfigError(
                f"SmoaConfig: settings_digest={self.settings_digest!r} is not that of these settings: "
                f"{CONFIG_NAME} was damaged or edited since it was saved; if that was on purpose, delete its "
                "settings_digest"
            )
        self.settings_digest = None  # settings may change from here on
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if (self.base_model_name_or_path or "").startswith("~"):
            self.base_model_name_or_path = str(Path(str(self.base_model_name_or_path)).expanduser())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> SmoaConfig:
        """Read `adapter_config.json` of a folder or hub id.

        The labels of such an adapter come from its file, so a layer made from this config decomposes nothing unless
        it is used without a file having been loaded.

        Raises:
            ConfigError: the file breaks a rule.
            AdapterFileError: the folder's weights are a pickle, or no safetensors file of a SMoA adapter.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        try:
            config: SmoaConfig = super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from None
        config.labels_follow = True
        config._compare_with_weights(folder)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, whole or not at all, with the digests by which its adapter is recognised.

        The home folder in the path of a local base becomes `~`.
        """
        saved = copy.copy(self)
        saved.settings_digest = self._settings_digest()
        if self.digest_of_saved is not None:  # PEFT has written them by now, transformers has not
            weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
            saved.weights_digest = saved_digest(weights, self.digest_of_saved) if weights.is_file() else None
            self.digest_of_saved = None
        saved.base_model_name_or_path = _without_home(self.base_model_name_or_path)
        with tempfile.TemporaryDirectory() as room:
            super(SmoaConfig, saved).save_pretrained(room, **kwargs)
            write_whole(Path(save_directory, CONFIG_NAME), Path(room, CONFIG_NAME).read_bytes())

    # Class attributes without annotation: not fields, so not saved.
    labels_follow = False
    digest_of_saved = cast("str | None", None)  # of the factors that PEFT asked for and is about to write
    weights_file = cast("Path | None", None)  # beside the file that this config was read from, till they are loaded
    saved_rank = 0  # the largest in that file

    def check_weights(self) -> None:
        """Raise AdapterFileError unless the weights beside the file that this was read from were saved with it."""
        if self.weights_file is None or self.weights_digest in (None, saved_digest(self.weights_file)):
            return
        raise AdapterFileError(
            f"{self.weights_file}: the tensors are not those that {CONFIG_NAME} was saved with: a file was damaged or "
            f"edited, or comes from another save; if that was on purpose, delete weights_digest from {CONFIG_NAME}"
        )

    def _compare_with_weights(self, folder: Path) -> None:
        self.weights_file = find_weights(folder)
        if self.weights_file is None:
            return
        self.saved_rank = largest_rank(self.weights_file)

    def check_rank(self, module: str) -> None:
        """Raise AdapterFileError if a module asks for a larger rank than any in the file that this comes with.

        It tells before anything of that size is made. What stands for no module of the model counts for nothing: r
        where a `rank_pattern` covers all, or a pattern meant for another model.
        """
        rank = self.rank_of(module)
        if self.weights_file is not None and rank > self.saved_rank:
            raise AdapterFileError(
                f"{self.weights_file.with_name(CONFIG_NAME)}: r or rank_pattern asks for rank {rank} in {module}, but "
                f"the largest factor in {self.weights_file.name} has {self.saved_rank} rows; they are of two adapters"
            )

    def _settings_digest(self) -> str:
        own = [f for f in fields(self) if f.name in SmoaConfig.__annotations__ and not f.name.endswith("_digest")]
        values = {f.name: getattr(self, f.name) for f in own}
        # A setting left at its default does not count, so that a version that has one more reads older files.
        return settings_digest({f.name: values[f.name] for f in own if values[f.name] not in (f.default, {})})

    def num_blocks_of(self, module: str) -> int:
        """K of the module of that name."""
        return self.spectrum_blocks.get(module) or _by_pattern(self.num_blocks_pattern, module, self.num_blocks)

    def rank_of(self, module: str) -> int:
        """Total rank of the module of that name."""
        r = _by_pattern(self.rank_pattern, module, self.r)
        return r // self.num_blocks * self.spectrum_blocks[module] if module in self.spectrum_blocks else r

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
        return alpha * self.spectrum_blocks.get(module, self.num_blocks) / self.num_blocks


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    return patterns.get(get_pattern_key(list(patterns), module), default)


def _without_home(name: str | None) -> str | None:
    """The name or path of a model with the home folder, which tells who the user is, as `~`."""
    home = Path("~").expanduser()
    if name is None or home == Path(home.anchor) or not Path(name).is_relative_to(home):
        return name
    return "~/" + Path(name).relative_to(home).as_posix()
