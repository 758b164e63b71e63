from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support import tiny_models


def test_a_tiny_model_gives_a_loss_that_reaches_its_weights(
    tiny_model: PreTrainedModel, tiny_batch: dict[str, Tensor]
) -> None:
    loss = tiny_model(**tiny_batch).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in tiny_model.parameters() if p.requires_grad)


def test_a_family_is_built_with_the_same_weights_every_time(family: str) -> None:
    first = tiny_models.build(family).state_dict()
    torch.rand(5)
    second = tiny_models.build(family).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", [*tiny_models.CAUSAL, "t5"])
def test_generative_families_generate(family: str) -> None:
    inputs = tiny_models.batch(family)
    del inputs["labels"]
    tokens = tiny_models.build(family).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[0] == 3
