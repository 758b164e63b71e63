"""Lets a model continue prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from smoa_lab.base_models import positions_of
from smoa_lab.data.encoding import pad_token
from smoa_lab.scoring.losses import left_padded, progress, scoring

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Without what a model's generation config may have for sampling alone."""


def continue_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    batch_size: int = 8,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt's token ids, in order; greedy where ``options`` say nothing else.

    Prompt and answer fit the model's positions, at most half of which the answer gets: a prompt that is too long for
    that loses its head.
    """
    texts: dict[int, str] = {}
    pad = pad_token(tokenizer)
    positions = positions_of(model.config)
    if positions is not None:
        new_tokens = min(new_tokens, positions // 2)
        room = positions - new_tokens
        # BOS stays where the prompt begins with it
        heads = [ids[:1] if ids[:1] == [tokenizer.bos_token_id] else [] for ids in prompts]
        prompts = [
            ids if len(ids) <= room else head + ids[len(ids) - room + len(head) :]
            for ids, head in zip(prompts, heads, strict=True)
        ]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with scoring(model), progress("writing", len(order)) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [prompts[number] for number in numbers]
            written = model.generate(
                **left_padded(batch, pad, next(model.parameters()).device),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
                **{"eos_token_id": ends_of(model, tokenizer), **options},
            )
            answers = tokenizer.batch_decode(written[:, max(map(len, batch)) :], skip_special_tokens=True)
            texts.update(zip(numbers, map(str.strip, answers), strict=True))
            bar.update(len(numbers))
    return [texts[number] for number in range(len(prompts))]


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's, with which answers are
    trained."""
    known = model.generation_config.eos_token_id
    return sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}) or None
