"""What makes values of SmoaConfig invalid, alone or together: each rule gives the problem in words."""

from __future__ import annotations

from typing import Any, Literal, get_args

from smoa.errors import ConfigError
from smoa.maths.blocks import MAX_BLOCKS
from smoa.maths.factors import check_block_ranks
from smoa.maths.modulations import ModulationKind
from smoa.maths.scale import ScaleKind
from smoa.maths.spectrum import PartitionKind

Bias = Literal["none", "all", "smoa_only"]


def value_problems(config: Any) -> list[str]:
    """The problems of a SmoaConfig whose values are of the right types."""
    found = [*_count_problems(config), *_size_problems(config), *_choice_problems(config), *_target_problems(config)]
    return [problem for problem in found if problem] or _block_rank_problems(config) or _spectrum_problems(config)


def _count_problems(config: Any) -> list[str | None]:
    problems = [_int_problem("r", config.r), _int_problem("num_blocks", config.num_blocks, MAX_BLOCKS)]
    for name, limit in (("rank_pattern", None), ("num_blocks_pattern", MAX_BLOCKS), ("spectrum_blocks", MAX_BLOCKS)):
        problems += [_int_problem(f"{name}[{key!r}]", value, limit) for key, value in getattr(config, name).items()]
    return problems


def _size_problems(config: Any) -> list[str | None]:
    problems = []
    for name in ("alpha_pattern", "normalized_alpha"):
        problems += [_positive_problem(f"{name}[{key!r}]", value) for key, value in getattr(config, name).items()]
    problems.append(None if config.alpha is None else _positive_problem("alpha", config.alpha))
    if not _is_number(config.smoa_dropout) or not 0 <= config.smoa_dropout < 1:
        problems.append(f"smoa_dropout={config.smoa_dropout!r} must be a number in [0, 1)")
    return problems


def _choice_problems(config: Any) -> list[str | None]:
    choices = {"bias": Bias, "partition": PartitionKind, "modulation": ModulationKind, "scale": ScaleKind}
    problems = [_choice_problem(name, getattr(config, name), get_args(kind)) for name, kind in choices.items()]
    return [*problems, _choice_problem("init_weights", config.init_weights, (True, False, "zero_A"))]


def _target_problems(config: Any) -> list[str | None]:
    problems: list[str | None] = []
    if config.layers_pattern and config.layers_to_transform is None:
        problems.append(f"layers_pattern={config.layers_pattern!r} has no effect without layers_to_transform")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        problems.append(
            f"layers_to_transform={config.layers_to_transform!r} needs target_modules to be a list of names, "
            f"not the regular expression {config.target_modules!r}"
        )
    return problems


def _block_rank_problems(config: Any) -> list[str]:
    if config.block_ranks is None:
        return []
    for name in ("rank_pattern", "num_blocks_pattern"):
        if getattr(config, name):
            return [f"block_ranks and {name} can't be combined: block_ranks fits one r and one K; drop one of them"]
    if not isinstance(config.block_ranks, (list, tuple)):
        return [f"block_ranks={config.block_ranks!r} must be a list of integers, one for each block"]
    try:
        check_block_ranks(tuple(config.block_ranks), config.r, config.num_blocks)
    except ConfigError as error:
        return [str(error)]
    return []


def _spectrum_problems(config: Any) -> list[str]:
    if not config.blocks_from_spectrum:
        return ["spectrum_blocks has no effect without blocks_from_spectrum"] if config.spectrum_blocks else []
    if config.block_ranks is not None or config.num_blocks_pattern:
        return ["blocks_from_spectrum decides about blocks itself; drop block_ranks and num_blocks_pattern"]
    uneven = [r for r in (config.r, *config.rank_pattern.values()) if r % config.num_blocks]
    if uneven:
        return [f"blocks_from_spectrum needs num_blocks={config.num_blocks} to divide every r, found {uneven[0]}"]
    return []


def _is_number(value: object) -> bool:
    """True for an int or float that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _int_problem(name: str, value: object, limit: int | None = None) -> str | None:
    """Unless a positive integer, at most `limit`."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (limit or value):
        return None
    return f"{name}={value!r} must be a positive integer" + (f", at most {limit}" if limit else "")


def _positive_problem(name: str, value: Any) -> str | None:
    """Unless a positive finite number."""
    if _is_number(value) and 0 < value < float("inf"):
        return None
    return f"{name}={value!r} must be a positive number"


def _choice_problem(name: str, value: object, choices: tuple[object, ...]) -> str | None:
    """Unless one of `choices`."""
    if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        return None
    return f"{name}={value!r} must be one of {', '.join(map(repr, choices))}"
