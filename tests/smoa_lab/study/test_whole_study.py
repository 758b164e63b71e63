"""A whole study on a tiny random model: what it trains, what is resumed, and its numbers by plain transformers and
PEFT."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from smoa_lab.study import run_study
from tests.support.own_rows import chats, rows_base, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # not ours: transformers and peft
    pytest.mark.usefixtures("quick_pictures"),
]
LORA = {"method": "lora", "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]}, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, chats, and others that are held out."""
    room = tmp_path_factory.mktemp("room")
    rows_base(room / "base")
    write_rows(room / "chats.jsonl", chats(100))
    write_rows(room / "held-out.jsonl", chats(160)[100:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        yield room


def values_in(room: Path) -> dict[str, Any]:
    """A study of two entries of the same trainable parameters."""
    smoa = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]}
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    return {
        "shared": {
            "model": {"name": str(room / "base")},
            "data": {"train": str(room / "chats.jsonl"), "test": str(room / "held-out.jsonl"), "samples": 2},
            "forgetting": {"tokens": 128},
            "training": {**training, "use_cpu": True},
        },
        "tuning": {"max_runs": 0},  # test_run_study.py has searches
        "seeds": [0, 1, 2],
        "entries": {
            "ours": {"method": "smoa", "adapter": smoa, "learning_rate": 0.01},
            "lora": LORA,
        },
        "keep": "all",
    }


def compare(folder: Path, values: dict[str, Any]) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    ran = CliRunner().invoke(app, ["compare", str(folder), "--json"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def summary(room: Path) -> dict[str, Any]:
    """What the study in room/study found."""
    found: dict[str, Any] = compare(room / "study", values_in(room))
    return found


def test_a_study_is_run_reported_and_never_run_twice(
    room: Path, summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, folder = summary["budgets"]["all"], room / "study"
    entries = budget["entries"]
    assert entries["ours"]["parameters"] == entries["lora"]["parameters"] == 448
    assert set(entries["lora"]["worst"]) == {"loss"}
    seeds = entries["lora"]["seeds"]
    assert seeds == [0, 1, 2][: budget["round"]]
    runs = list(folder.glob("*/lr-*-seed-[012]"))
    assert len(runs) == 2 * len(seeds)
    for run in runs:
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["forgetting"]["change"] is not None
        assert len(metrics["samples"]) == 2
    monkeypatch.setattr(run_study, "run", lambda config: pytest.fail("a finished run is run again"))
    assert compare(folder, values_in(room)) == summary


def plain_losses(run: Path, base: Path, rows: Path) -> tuple[list[float], list[int]]:
    """The negative log-likelihood of the assistant's tokens of each row, and their number."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    losses, tokens = [], []
    for line in rows.read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["assistant_masks"][1:])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        of_token = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(float((of_token * mask).sum()))
        tokens.append(int(mask.sum()))
    return losses, tokens


def test_difference_and_bound_are_those_of_the_saved_adapters(room: Path, summary: dict[str, Any]) -> None:
    budget = summary["budgets"]["all"]
    mean, upper = next(each[2:] for each in budget["pairs"] if each[:2] == ["lora", "ours"])
    gaps, means = [], []
    for seed in range(budget["round"]):
        folders = (next((room / "study" / name).glob(f"lr-*-seed-{seed}")) for name in ("lora", "ours"))
        (lora, tokens), (ours, _) = (plain_losses(run, room / "base", room / "held-out.jsonl") for run in folders)
        gaps.append(np.subtract(lora, ours))
        means.append((sum(lora) / sum(tokens), sum(ours) / sum(tokens)))
    count, seeds, total = len(tokens), len(gaps), sum(tokens)
    of_seeds = np.sum(gaps, axis=1) / total
    alone = np.subtract(gaps, np.outer(of_seeds, tokens))  # what a row does in one seed is in the seeds' spread
    around = np.mean(gaps, axis=0) - of_seeds.mean() * np.array(tokens)
    of_rows = count / (count - 1) * (around**2).sum() - alone.var(axis=0, ddof=1).sum() / seeds
    of_rows = max(0.0, of_rows) / total**2
    spread = np.sort(np.var(means, axis=0, ddof=1))
    freedom = 2 * (seeds - 1)
    if spread[1] > stats.f.ppf(0.95, seeds - 1, seeds - 1) * spread[0]:  # one of the two is wild
        freedom = (seeds - 1) * spread.sum() ** 2 / (spread**2).sum()
    of_choice = 2 * spread.mean() / seeds
    if seeds == 2:  # Cochran and Cox
        each = stats.t.ppf(1 - budget["level"], [count - 1, freedom])
        times = (of_rows * each[0] + of_choice * each[1]) / (of_rows + of_choice)
    else:
        both = (of_rows + of_choice) ** 2 / (of_rows**2 / (count - 1) + of_choice**2 / freedom)
        times = stats.t.ppf(1 - budget["level"], both)
    width = times * (of_rows + of_choice) ** 0.5
    assert mean == pytest.approx(of_seeds.mean(), abs=1e-5)
    assert upper - mean == pytest.approx(width, rel=0.02)
