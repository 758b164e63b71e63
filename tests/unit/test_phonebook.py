"""The study of a phone book: the last layers train as the whole model does, until the loss no longer falls."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import last_layers
import numpy as np
import phonebook
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from smoa.errors import ConfigError
from smoa_lab.data.rows import content_hash, question
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.report import full_names
from smoa_lab.study.trials import Trial, TrialStore
from tests.support import studies, tiny_models

TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_layers_have_the_losses_and_gradients_of_the_whole_model(attention: str) -> None:
    base = tiny_models.llama()
    base.set_attn_implementation(attention)
    head = base.get_output_embeddings().weight.detach()[[5, 9, 33]]
    tokens = [torch.randint(64, (length,)) for length in (7, 5)]
    answers = [torch.tensor([-100] * (length - 3) + [2, 0, 1]) for length in (7, 5)]
    hidden = last_layers.hidden_below(base, 1, pad_sequence(tokens, batch_first=True))
    adapter = LoraConfig(target_modules=TARGETS, init_lora_weights=False)
    last: Any = get_peft_model(last_layers.top_of(base, 1), adapter)
    lines = [last_layers.Line(one[: len(own)], own) for one, own in zip(hidden, answers, strict=True)]
    batch = last_layers.batch_of(lines)
    losses, right = last_layers.losses(last(inputs_embeds=batch["inputs_embeds"]).logits, batch["labels"], head)
    losses.mean().backward()
    # The layers are shared, so the whole model has the adapter too.
    logits = torch.cat([base(input_ids=own[None]).logits[0, -3:, [5, 9, 33]] for own in tokens])
    wanted = torch.tensor([2, 0, 1] * 2)
    whole = F.cross_entropy(logits, wanted, reduction="none")
    torch.testing.assert_close(losses, whole)
    assert right.tolist() == (logits.argmax(-1) == wanted).tolist()
    trained = [parameter for parameter in last.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(whole.mean(), trained)
    torch.testing.assert_close([parameter.grad for parameter in trained], list(gradients))


def test_what_scored_the_untouched_model_also_trains() -> None:
    runner: Any = object.__new__(last_layers.LastLayers)
    runner.base = tiny_models.llama(), SimpleNamespace(eos_token_id=0)
    row = question("names", "0", "Ann Fox:", " 1")
    runner._kept[content_hash([row])] = [last_layers.Line(torch.randn(3, 32), torch.tensor([-100, 7, 0]))]
    (outcome,) = runner._outcomes(None, None, [row])
    assert outcome.gold_tokens == 1
    hidden = torch.randn(1, 32, requires_grad=True)
    last_layers.losses(hidden, torch.tensor([7]), runner.head)[0].mean().backward()


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
    plateau = last_layers.Plateau(warmup=4, steps=8, passes=200)
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


def test_other_numbers_of_names_take_the_rates_of_finished_searches(tmp_path: Path) -> None:
    study = studies.tiny_study(tmp_path)
    with pytest.raises(ConfigError, match="no learning rate is known"):
        last_layers.at_searched_rates(study, Comparison(study))
    for rate, loss in ((0.003, 0.5), (0.01, 0.9), (0.03, 1.0), (0.001, 0.7)):
        studies.finish(study, Trial("tuning", "ours", rate, study.tuning.seed), loss)
    studies.finish(study, Trial("tuning", "lora", 0.01, study.tuning.seed), 0.5)
    other = last_layers.at_searched_rates(study, Comparison(study))
    assert {name: entry.learning_rate for name, entry in other.entries.items()} == {"ours": 0.003}
    assert Comparison(other).search("ours") == []


def test_the_report_counts_the_bits_that_are_stored_and_the_numbers_recalled(tmp_path: Path) -> None:
    study = studies.tiny_study(tmp_path / "phonebook-40")
    steps = 7 * 5  # passes of 40 names in batches of 8
    training = {"learning_rate": 0.01, "per_device_train_batch_size": 8, "num_train_epochs": 7}
    for seed, loss in enumerate((math.log(10) / 2, math.log(10))):  # half of the bits, and none
        config = {"method": "smoa", "training": training}
        scores = {"all": {"questions": 40, "gold_loss": loss, "accuracy": 0.5 - seed / 4}}
        studies.finish(study, Trial("final", "ours", 0.01, seed), loss, config=config, steps=steps, scores=scores)
    (row,) = phonebook.means(phonebook.measured(tmp_path))
    assert row["bits"] == pytest.approx(40 * phonebook.BITS / 4 / 1000)
    assert (row["recalled"], row["held"], row["seeds"]) == (37.5, 0.375 * 40 * 25, 2)
    assert (row["passes"], row["limit"]) == (7, 2)
    (tmp_path / "phonebook").mkdir()
    phonebook.report(tmp_path)
    assert "| ours | 1,000 | 40 | 0.01 | 2 | 0.332 | 37.5 | 7 | 2 |" in (tmp_path / "phonebook/README.md").read_text()


def test_the_law_is_found_from_made_values_where_both_budgets_are_there_at_three_numbers_of_names() -> None:
    def rows(counts: tuple[int, ...]) -> list[dict[str, Any]]:
        return [
            {
                "entry": f"ours{'-r2' * (r > 1)}",
                "budget": r,
                "names": n,
                "parameters": 1000 * r,
                "bits": own * n / 1000 / r,
            }
            for r, n in product((1, 2), counts)
            for own in [50 * r**0.8 * n**-0.5 + 3]
        ]

    assert "| ours | 50 | 0.80 | 0.50 | 3.00 | 0.00 |" in phonebook.laws(rows((128, 512, 2048)))
    assert "Not fitted" in phonebook.laws(rows((128, 512)))
    falls_from_33 = phonebook.fitted(
        *(np.array(known) for known in ([1, 1, 2, 2], [128, 512, 512, 2048], [32, 29, 31, 25]))
    )
    assert falls_from_33 == pytest.approx((-1 / 128, -1, -1, 33, 0), abs=1e-9)


def test_entries_of_two_budgets_have_the_same_name(tmp_path: Path) -> None:
    study = studies.tiny_study(tmp_path / "phonebook-40")
    for entry in ("lora", "ours"):
        studies.finish(study, Trial("final", entry, 0.01, 0), 1.0, config={"method": "lora"})
    store = TrialStore(study.folder)
    assert full_names(store, {"lora": 1, "ours": 2}) == {"lora": "LoRA", "ours": "LoRA"}
    assert full_names(store) == {"lora": "LoRA", "ours": "LoRA: ours"}
