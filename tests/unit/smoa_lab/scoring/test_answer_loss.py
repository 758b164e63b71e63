from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa_lab.data.prompts import IGNORED, Encoded
from smoa_lab.scoring.answer_loss import answer_nll, answer_positions, collate, left_padded, logits_at, mean_answer_loss
from tests.support import tiny_models
from tests.support.tolerance import assert_close

BATCH = [Encoded([1, 5, 6, 7], [8, 9]), Encoded([1, 5], [10, 11, 12])]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return collate([one.row for one in BATCH], pad=0)


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_models.build(request.param).eval()


def test_the_collator_pads_on_the_right_and_masks_what_it_padded(batch: dict[str, Tensor]) -> None:
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 8, 9], [1, 5, 10, 11, 12, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["labels"][1].tolist() == [IGNORED, IGNORED, 10, 11, 12, IGNORED]


def test_prompts_that_go_on_are_padded_on_the_left() -> None:
    batch = left_padded([[1, 5, 6], [7]], pad=0, device=torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[1, 5, 6], [0, 0, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_only_the_logits_at_the_answers_are_computed(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    labels = batch.pop("labels")
    full = model(**batch).logits
    with logits_at(model, answer_positions(labels)):
        kept = model(**batch).logits
    assert kept.shape == (1, 5, full.shape[-1])
    assert_close(kept[0], full[answer_positions(labels)])
    assert model(**batch).logits.shape == full.shape


def test_soft_capping_of_the_logits_still_happens(batch: dict[str, Tensor]) -> None:
    model = tiny_models.build("gemma3").eval()
    model.config.final_logit_softcapping = 0.5
    labels = batch.pop("labels")
    with logits_at(model, answer_positions(labels)):
        assert model(**batch).logits.abs().max() <= 0.5


def test_the_loss_and_its_gradient_are_those_of_the_models_own_loss(
    model: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    expected = model(**batch).loss
    weight = model.get_input_embeddings().weight
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    labels = batch.pop("labels")
    with logits_at(model, answer_positions(labels)):
        loss = mean_answer_loss(model(**batch), labels)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, weight)[0], expected_gradient)


def test_accumulated_batches_divide_by_all_their_answer_tokens(
    model: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    labels = batch.pop("labels")
    outputs = model(**batch)
    assert_close(
        mean_answer_loss(outputs, labels, num_items_in_batch=10), answer_nll(outputs.logits, labels).sum() / 10
    )


def test_a_model_without_an_output_layer_gives_all_logits(batch: dict[str, Tensor]) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    plain = Plain()
    with logits_at(plain, answer_positions(batch["labels"])):
        assert plain(batch["input_ids"]) is batch["input_ids"]


def test_a_model_without_an_output_layer_of_its_own_gives_all_logits(
    batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_models.build("llama").eval()
    labels = batch.pop("labels")
    full = model(**batch).logits
    model.get_output_embeddings = lambda: None
    with logits_at(model, answer_positions(labels)):
        assert torch.equal(model(**batch).logits, full)
    assert "LlamaForCausalLM has no output embeddings" in caplog.text


def test_an_output_layer_that_is_applied_to_something_else_is_left_alone(
    model: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    labels = batch.pop("labels")
    last = model(**batch, logits_to_keep=2).logits
    with logits_at(model, answer_positions(labels)):
        assert torch.equal(model(**batch, logits_to_keep=2).logits, last)
    assert last.shape[1] == 2
