"""How many tokens a model takes at once, and what has to fit into them."""

from __future__ import annotations

from transformers import PretrainedConfig


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model takes; None where its positions are not limited."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def prompt_room(config: PretrainedConfig, new_tokens: int) -> tuple[int | None, int]:
    """The most tokens of a prompt, None for any number, and how many a model can write after it: ``new_tokens``, but at
    most half of its positions."""
    positions = positions_of(config)
    if positions is None:
        return None, new_tokens
    written = min(new_tokens, positions // 2)
    return positions - written, written
