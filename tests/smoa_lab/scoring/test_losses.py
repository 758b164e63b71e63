"""Losses at trained positions only, and shared prompts, against loops over rows and tokens."""

import io
import math
import statistics
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel

from smoa_lab.data.encoding import IGNORED, Tokens
from smoa_lab.scoring import losses
from smoa_lab.scoring.losses import (
    Losses,
    answer_positions,
    collate,
    logits_at,
    row_losses,
    score,
    scoring,
)
from tests.support import tiny
from tests.support.layers import assert_close


def tokens(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens(prompt + answer, [IGNORED] * len(prompt) + answer)


BATCH = [tokens([1, 5, 6, 7], [8, 9]), tokens([1, 5], [10, 11, 12])]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return collate([row.columns for row in BATCH], pad=0)


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.build(request.param).eval()


def test_the_collator_pads_on_the_right_and_masks_what_it_padded(batch: dict[str, Tensor]) -> None:
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 8, 9], [1, 5, 10, 11, 12, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["labels"][1].tolist() == [IGNORED, IGNORED, 10, 11, 12, IGNORED]


def test_only_the_logits_at_the_answers_are_computed(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    labels = batch.pop("labels")
    full = model(**batch).logits
    with logits_at(model, answer_positions(labels)):
        kept = model(**batch).logits
    assert kept.shape == (1, 5, full.shape[-1])
    assert_close(kept[0], full[answer_positions(labels)])
    assert model(**batch).logits.shape == full.shape


def test_soft_capping_of_the_logits_still_happens(batch: dict[str, Tensor]) -> None:
    model = tiny.build("gemma3").eval()
    model.config.final_logit_softcapping = 0.5
    labels = batch.pop("labels")
    with logits_at(model, answer_positions(labels)):
        assert model(**batch).logits.abs().max() <= 0.5


def test_an_output_layer_that_is_applied_to_something_else_is_left_alone(
    model: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    labels = batch.pop("labels")
    last = model(**batch, logits_to_keep=2).logits
    with logits_at(model, answer_positions(labels)):
        assert torch.equal(model(**batch, logits_to_keep=2).logits, last)
    assert last.shape[1] == 2


SEQUENCES = [
    tokens([1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21]),
    tokens([1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [22]),
    tokens([1, 4, 6, 7, 8, 9, 10, 11, 12, 13], [22, 23, 24, 25]),
    tokens([1, 5, 6], [30, 31, 32]),
    tokens([1, 5, 6], [33]),
    tokens([1, 5, 7], [33]),
    tokens([1], [33, 2]),
]
"""Prompts of equal and unequal lengths, shared or not, past the tiny Gemma's window of 8; answers of 1 to 4."""


def one_by_one(model: PreTrainedModel, sequence: Tokens) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([sequence.input_ids])).logits[0]
    answer = torch.tensor(sequence.answer)
    return float(cross_entropy(logits[-len(answer) - 1 : -1], answer, reduction="sum"))


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sharing_prompts_gives_what_scoring_one_by_one_gives(family: str, batch_tokens: int) -> None:
    model = tiny.build(family).eval()
    scores = score(model, SEQUENCES, pad=0, batch_tokens=batch_tokens)
    assert list(map(len, scores)) == [len(sequence.answer) for sequence in SEQUENCES]
    assert list(map(sum, scores)) == pytest.approx([one_by_one(model, s) for s in SEQUENCES], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_each_prompt_is_run_once_for_all_its_answers(family: str) -> None:
    """Past the tiny Gemma's window of 8; gpt2's positions are learned."""
    model = tiny.build(family).eval()
    common = [*range(1, 7)]
    prompts = [[*common, 40], [*common, 41, 42, 43], [*common, 44, 45]]
    sequences = [tokens(prompt, answer) for prompt in prompts for answer in ([30], [31, 32], [33])]
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    scores = score(model, sequences, pad=0, batch_tokens=1000)
    hook.remove()
    assert list(map(sum, scores)) == pytest.approx([one_by_one(model, s) for s in sequences], rel=1e-4)
    assert seen == [3 * 9, 3]


def test_padding_takes_no_positions_that_the_model_does_not_have() -> None:
    model = tiny.build("gpt2").eval()  # of 64 positions
    prompt = [*range(3, 35), *range(3, 33)]
    sequences = [tokens(prompt, [20, 21]), tokens(prompt, [22]), tokens(prompt[:3], [23, 24, 25, 26])]
    scores = score(model, sequences, pad=0, batch_tokens=1000)
    assert list(map(sum, scores)) == pytest.approx([one_by_one(model, s) for s in sequences], rel=1e-4)


def test_a_model_that_keeps_no_keys_and_values_is_scored_all_the_same() -> None:
    model = tiny.build("llama").eval()
    expected = [one_by_one(model, sequence) for sequence in SEQUENCES[:-1]]

    def forget(module: PreTrainedModel, inputs: tuple[object, ...], output: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=output.logits)

    model.register_forward_hook(forget)
    scores = score(model, SEQUENCES[:-1], pad=0, batch_tokens=1000)
    assert list(map(sum, scores)) == pytest.approx(expected, rel=1e-4)


def test_layers_that_keep_a_state_instead_of_keys_and_values_share_no_prompt() -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, initializer_range=0.2, pad_token_id=0)).eval()
    scores = score(model, SEQUENCES, pad=0, batch_tokens=1000)
    assert list(map(sum, scores)) == pytest.approx([one_by_one(model, s) for s in SEQUENCES], rel=1e-4)


ROWS = [
    Tokens([5, 6, 7], [IGNORED, 6, 7]),
    Tokens(list(range(1, 21)), [IGNORED] * 10 + list(range(11, 21))),
    Tokens([9, 10, 11, 12], [9, 10, 11, 12]),  # the first is never predicted
    Tokens([3, 4, 5, 6, 7, 8], [IGNORED, 4, 5, IGNORED, IGNORED, 8]),
    Tokens([30, 31], [IGNORED, IGNORED]),
]


@torch.no_grad()
def naive(model: PreTrainedModel) -> list[tuple[float, int]]:
    """Token by token, one row at a time."""
    found = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        places = [i for i in range(1, len(row.labels)) if row.labels[i] != IGNORED]
        nll = [-float(log_softmax(logits[i - 1], dim=-1)[row.labels[i]]) for i in places]
        found.append((sum(nll), len(places)))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 24, 10_000])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_losses_are_those_of_a_loop_over_rows_and_tokens(
    family: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(family).eval()
    monkeypatch.setattr(losses, "BATCH_LOGITS", batch_tokens * model.config.get_text_config().vocab_size)
    found, expected = row_losses(model, ROWS, pad=0), naive(model)
    assert found.tokens == [count for _, count in expected] == [2, 10, 3, 3, 0]
    assert found.nll == pytest.approx([nll for nll, _ in expected], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("on_terminal", [True, False])
def test_progress_is_shown_on_a_terminal_where_the_log_is_shown(
    on_terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream: Any = io.StringIO()
    stream.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    for level in ("WARNING", "INFO"):
        caplog.set_level(level, "smoa_lab")
        row_losses(tiny.build("llama"), BATCH, pad=0)
        assert ("scoring: " in stream.getvalue()) is (on_terminal and level == "INFO")


def test_the_mean_is_over_tokens_and_not_over_rows() -> None:
    measured = Losses([2.0, 30.0], [1, 10])
    assert measured.mean == pytest.approx(32 / 11)
    residuals = [2 - 32 / 11, 30 - 320 / 11]
    assert measured.stderr == pytest.approx(math.hypot(*residuals) * math.sqrt(2) / 11)
    even = Losses([1.0, 2.0, 4.0, 5.0], [1, 1, 1, 1])
    assert math.isnan(Losses([1.0], [3]).stderr)
    assert even.stderr == pytest.approx(statistics.stdev(even.nll) / 2)  # as of any mean


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_even_after_an_error(training: bool) -> None:
    model = nn.Linear(2, 2).train(training)

    def fail() -> None:
        with scoring(model):
            assert not model.training
            assert not model(torch.ones(2)).requires_grad
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training == training
