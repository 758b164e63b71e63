"""The accuracies that lm-eval computes of the same questions with the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from smoa_lab.data.encoding import Encoder
from smoa_lab.data.questions import candidates
from smoa_lab.scoring.evaluation import answer_outcomes, score_outcomes
from tests.support import lab


@pytest.mark.parametrize("style", ["text", "label"])
def test_accuracies_are_those_of_lm_eval(style: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    class Naive(LM):
        """One answer at a time, all logits."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [self.scored(*request.args) for request in requests]

        @torch.no_grad()
        def scored(self, prompt: str, answer: str) -> tuple[float, bool]:
            ids = torch.tensor([encoder.tokenizer(prompt + answer)["input_ids"]])
            logits, wanted = model(ids).logits[0, -len(answer) - 1 : -1], ids[0, -len(answer) :]
            greedy = bool((logits.argmax(-1) == wanted).all())
            return float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum()), greedy

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    questions = lab.questions(12, "test")
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    encoder = Encoder(lab.byte_tokenizer(), None, style=style)
    rows = [
        {"prompt": encoder.question_text(row), "choices": candidates(row, encoder.style), "label": row.label}
        for row in questions
    ]
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task = ConfigurableTask(
        config={
            "task": "sums",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": metrics,
        }
    )
    theirs: Any = simple_evaluate(
        Naive(), tasks=[task], task_manager=TaskManager(include_defaults=False), log_samples=False
    )["results"]["sums"]
    ours = score_outcomes(answer_outcomes(model, encoder, questions))["all"]
    for name, value in (("acc", ours.accuracy), ("acc_norm", ours.accuracy_norm)):
        assert theirs[f"{name},none"] == pytest.approx(value)
    assert theirs["acc_stderr,none"] == pytest.approx(ours.accuracy_stderr)
