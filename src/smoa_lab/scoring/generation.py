"""Scores generated text by the protocol of the adapter literature: generate, then extract the answer.

Answers are extracted by the reference's rules (LLM-Adapters, arXiv:2304.01933): for the commonsense sets the first
match of the task's labels, for mathematics the last number. If nothing is found the answer is wrong, and also
counted as an extraction failure. Do not put these scores into one table with likelihood scores.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from smoa_lab.basics.extras import import_package
from smoa_lab.basics.positions import prompt_room
from smoa_lab.data.encoding import Encoder, pad_token
from smoa_lab.data.rows import AnswerStyle, Row, gold_response, label_names
from smoa_lab.data.tasks import Family
from smoa_lab.scoring.losses import left_padded, proportion, scoring

NEW_TOKENS: dict[Family, int] = {"commonsense": 16, "maths": 256, "dialogue": 48, "text": 48}
NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass(frozen=True)
class Generated:
    """One question: what was written, what was found in it, what should have been found."""

    row: Row
    text: str
    found: str | None
    wanted: str


@dataclass(frozen=True)
class GenerationScores:
    """``exact_match`` with its standard error, and the number of texts in which no answer was found. For dialogue
    the answer is the whole text, so the overlap scores matter: mean ``token_f1``, corpus ``bleu`` (sacrebleu, 0 to
    100) and ``rouge_l`` (0 to 1)."""

    questions: int
    exact_match: float
    exact_match_stderr: float
    extraction_failures: int
    token_f1: float | None = None
    bleu: float | None = None
    rouge_l: float | None = None


def evaluate_by_generation(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    families: Mapping[str, Family],
    batch_size: int = 16,
    num_beams: int = 1,
) -> tuple[dict[str, GenerationScores], list[Generated]]:
    """Scores per task, and every text for inspection. Greedy, or beam search with ``num_beams``."""
    scores: dict[str, GenerationScores] = {}
    generated: list[Generated] = []
    for name in dict.fromkeys(row.task for row in rows):
        family, chosen = families[name], [row for row in rows if row.task == name]
        prompts = [encoder.answered(row, "", end=False).prompt for row in chosen]
        new_tokens = NEW_TOKENS[family]
        texts = continue_prompts(model, encoder.tokenizer, prompts, new_tokens, batch_size, num_beams=num_beams)
        extract, answers = EXTRACTORS[family], []
        for row, text in zip(chosen, texts, strict=True):
            wanted = extract(row, gold_response(row, encoder.style), encoder.style) or str(row.completion)
            answers.append(Generated(row, text, extract(row, text, encoder.style), wanted))
        scores[name] = _scores(answers, family)
        generated += answers
    return scores, generated


def continue_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    batch_size: int = 8,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt's token ids, in order; greedy where ``options`` say nothing else.

    Prompt and answer fit the model's positions: a prompt that is too long for that loses its head.
    """
    texts: dict[int, str] = {}
    pad = pad_token(tokenizer)
    room, new_tokens = prompt_room(model.config, new_tokens)
    if room is not None:  # BOS stays where the prompt begins with it
        heads = [ids[:1] if ids[:1] == [tokenizer.bos_token_id] else [] for ids in prompts]
        prompts = [
            ids if len(ids) <= room else head + ids[len(ids) - room + len(head) :]
            for ids, head in zip(prompts, heads, strict=True)
        ]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with scoring(model):
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
    return [texts[number] for number in range(len(prompts))]


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's, with which answers are
    trained."""
    known = model.generation_config.eos_token_id
    return sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}) or None


def extract_choice(row: Row, text: str, style: AnswerStyle) -> str | None:
    """The first of the task's labels in ``text``; in the text style the choice that ``text`` is, whatever the case."""
    if style == "label":
        match = re.search("|".join(reversed(label_names(row))), text)  # answer11 before answer1, its beginning
        return match.group() if match else None
    plain = " ".join(text.split()).casefold()
    return next((choice for choice in row.choices if " ".join(choice.split()).casefold() == plain), None)


def extract_number(row: Row, text: str, style: AnswerStyle) -> str | None:
    """The last number in ``text``, thousands separators left out, whole numbers without a decimal point."""
    numbers = NUMBER.findall(text.replace(",", ""))
    return f"{float(numbers[-1]):.15g}" if numbers else None


def extract_all(row: Row, text: str, style: AnswerStyle) -> str | None:
    """The whole text; nothing where the model wrote nothing."""
    return text.strip() or None


EXTRACTORS: dict[Family, Callable[[Row, str, AnswerStyle], str | None]] = {
    "commonsense": extract_choice,
    "maths": extract_number,
    "dialogue": extract_all,
    "text": extract_all,
}


def _scores(generated: list[Generated], family: Family) -> GenerationScores:
    share, stderr = proportion([answer.found == answer.wanted for answer in generated])
    scores = GenerationScores(len(generated), share, stderr, sum(answer.found is None for answer in generated))
    if family != "dialogue":
        return scores
    sacrebleu = import_package("sacrebleu", "BLEU")
    rouge = import_package("rouge_score.rouge_scorer", "ROUGE").RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [(str(answer.row.completion), answer.text) for answer in generated]
    return replace(
        scores,
        token_f1=sum(token_f1(text, gold) for gold, text in pairs) / len(pairs),
        bleu=sacrebleu.corpus_bleu([text for _, text in pairs], [[gold for gold, _ in pairs]]).score,
        rouge_l=sum(rouge.score(gold, text)["rougeL"].fmeasure for gold, text in pairs) / len(pairs),
    )


def token_f1(text: str, answer: str) -> float:
    """The harmonic mean of precision and recall of words, as in SQuAD and ConvAI2, case and punctuation aside."""
    ours, gold = (Counter(re.findall(r"\w+", words.casefold())) for words in (text, answer))
    common = sum((ours & gold).values())
    return 2 * common / (sum(ours.values()) + sum(gold.values())) if common else 0.0
