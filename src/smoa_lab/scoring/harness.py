"""Scores through lm-eval's own API, tasks and metrics: acc, acc_norm and their standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from torch import nn

from smoa.errors import DataError
from smoa_lab.data.prompts import PromptEncoder, candidates
from smoa_lab.data.records import Record
from smoa_lab.scoring.likelihood import score_answers


class AnswerLM(LM):
    """A causal language model behind lm-eval's interface that computes only the logits it needs.

    For lm-eval's own tasks its HFLM does as well, slower: ``HFLM(pretrained=peft_model, tokenizer=tokenizer)``.
    """

    def __init__(self, model: nn.Module, encoder: PromptEncoder, batch_tokens: int = 4096) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder
        self.batch_tokens = batch_tokens

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's continuation, and whether greedy decoding gives it."""
        sequences = [self.encoder.encode_texts(request.args[0], request.args[1], end=False) for request in requests]
        scores = score_answers(self.model, sequences, self.encoder.pad, self.batch_tokens)
        return [(-score.loss, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("AnswerLM scores answers; use lm-eval's HFLM for the perplexity of whole texts")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("AnswerLM scores answers; use lm-eval's HFLM to generate")


def evaluate_with_harness(
    model: nn.Module, encoder: PromptEncoder, records: Sequence[Record], batch_tokens: int = 4096
) -> dict[str, dict[str, float | None]]:
    """Per task: ``acc``, ``acc_norm`` and their standard errors, as lm-eval computes them: None for a single question.

    Raises:
        DataError: a record has no choices, so there is nothing to choose by likelihood.
    """
    free = next((record.task for record in records if not record.choices), None)
    if free is not None:
        raise DataError(f"{free}: has free answers; the likelihood protocol of lm-eval needs choices")
    names = dict.fromkeys(record.task for record in records)
    tasks = [_task(name, [record for record in records if record.task == name], encoder) for name in names]
    results: Any = simple_evaluate(AnswerLM(model, encoder, batch_tokens), tasks=tasks, log_samples=False)
    return {name: _plain(results["results"][name]) for name in names}


def _task(name: str, records: list[Record], encoder: PromptEncoder) -> ConfigurableTask:
    """The records as a local multiple-choice task; prompts are ours, so that training and scoring agree."""
    from datasets import Dataset

    rows = [
        {
            "prompt": encoder.prompt_text(record),
            "choices": candidates(record, encoder.style),
            "label": record.label,
        }
        for record in records
    ]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    return ConfigurableTask(config=config)


def _plain(result: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval names scores ``acc,none``: metric, filter. A standard error that it can't compute is ``N/A``."""
    named = {key.removesuffix(",none"): value for key, value in result.items()}
    found = {key: named[key] for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}
    return {key: None if value == "N/A" else float(value) for key, value in found.items()}
