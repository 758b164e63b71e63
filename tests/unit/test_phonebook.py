"""The study of a phone book: the last layers train as the whole model does, until the loss no longer falls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import phonebook
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import tiny_models

DIGITS = [5, 9, 33]
TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_layers_have_the_losses_and_gradients_of_the_whole_model(attention: str) -> None:
    base = tiny_models.llama()
    base.set_attn_implementation(attention)
    tokens, answers = torch.randint(64, (4, 7)), torch.randint(3, (4, 3))
    hidden = phonebook.hidden_below(base, 1, tokens)
    adapter = LoraConfig(target_modules=TARGETS, init_lora_weights=False)
    last = get_peft_model(phonebook.top_of(base, 1, DIGITS), adapter)
    losses = phonebook.losses(last(inputs_embeds=hidden).logits, answers)
    losses.mean().backward()
    # The layers are shared, so the whole model has the adapter too.
    logits: Any = base(input_ids=tokens).logits[..., DIGITS]
    whole = phonebook.losses(logits, answers)
    torch.testing.assert_close(losses, whole)
    trained = [parameter for parameter in last.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(whole.mean(), trained)
    torch.testing.assert_close([parameter.grad for parameter in trained], list(wanted))


@pytest.mark.parametrize(
    ("losses", "goes_down"),
    [
        ([2.0] * 10, False),
        ([2.0] * 11, True),
        ([2.0 * 0.99**i for i in range(30)], False),
        ([2.0 * 0.9995**i for i in range(12)], True),
        ([0.5, 0.019], True),
    ],
)
def test_the_rate_goes_down_when_the_loss_no_longer_falls_or_all_is_known(losses: list[float], goes_down: bool) -> None:
    plateau = phonebook.Plateau(warmup=4, steps=8, passes=200)
    control = SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(log_history=[{"loss": loss} for loss in losses], global_step=8 * len(losses))
    plateau.on_log(None, state, control)
    last = state.global_step + 80 if goes_down else 1600
    steps = (0, 3, last - 81, last - 40, last)
    assert [plateau.factor(step) for step in steps] == [0.25, 1.0, 1.0, 0.5, 0.0]
    assert not control.should_training_stop
    state.global_step = last
    plateau.on_log(None, state, control)
    assert control.should_training_stop
