"""How many tokens a model takes at once, and what has to fit into them."""

from __future__ import annotations

from transformers import PretrainedConfig

from smoa.errors import ConfigError


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model takes; None where its positions are not limited."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def check_positions(config: PretrainedConfig, place: str, longest: float, what: str) -> None:
    """Beyond its positions a model fails, or writes nonsense.

    Raises:
        ConfigError: ``what``, of at most ``longest`` tokens, may exceed them; ``place`` is the key that cuts it.
    """
    positions = positions_of(config)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"{place}: {what} of up to {longest:,} tokens would be given to this model, which has {positions:,} "
            f"positions; set it to {positions}"
        )


def prompt_room(config: PretrainedConfig, new_tokens: int) -> tuple[int | None, int]:
    """The most tokens of a prompt, None for any number, and how many a model can write after it: ``new_tokens``, but at
    most half of its positions."""
    positions = positions_of(config)
    if positions is None:
        return None, new_tokens
    written = min(new_tokens, positions // 2)
    return positions - written, written
