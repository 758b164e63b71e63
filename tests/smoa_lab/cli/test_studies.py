"""`smoa compare` and `smoa tune`. Runs are written, but for one study at the end whose numbers are held against plain
transformers and PEFT."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from smoa_lab.base_models import empty_model
from smoa_lab.cli.main import app
from smoa_lab.study import run_study
from smoa_lab.study.bounds import Family
from smoa_lab.study.study import load_study
from tests.support.lab import chats, rows_base, write_rows
from tests.support.studies import WrittenRuns, write_runs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # not ours: transformers and peft
    pytest.mark.usefixtures("quick_pictures"),
]
NEW = ("compare", "--model", "base", "--data", "chats.jsonl")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny model and chats."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows_base(tmp_path / "base")
    write_rows(tmp_path / "chats.jsonl", chats(100))
    return tmp_path


@pytest.fixture
def written(room: Path, monkeypatch: pytest.MonkeyPatch) -> WrittenRuns:
    """Runs are written, and not trained."""
    runs = write_runs(monkeypatch)
    monkeypatch.setattr("smoa_lab.study.written.empty_model", empty_model)
    runs.parameters = 7424  # of LoRA with r = 8
    return runs


def smoa(*words: str, code: int = 0) -> Any:
    ran = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert ran.exit_code == code, ran.output
    return ran


def test_the_command_writes_a_study_runs_it_and_goes_on_with_it(room: Path, written: WrittenRuns) -> None:
    ran, number = smoa(*NEW), len(written.ran)
    assert "take lora" in ran.stdout
    assert "studies/chats/lora/lr-" in ran.stdout
    assert ran.stdout.splitlines()[-1].endswith(": studies/chats")
    for again in (NEW, ("compare", "studies/chats"), ("compare", "studies/chats/study.yaml")):
        assert smoa(*again).stdout == ran.stdout
    (room / "chats.jsonl").unlink()
    summary = json.loads(smoa("compare", "studies/chats", "--report-only", "--json").stdout)
    assert summary["budgets"]["all"]["take"] == "lora", "a report needs no rows"
    assert len(written.ran) == number


def test_an_interrupted_first_start_in_a_folder_of_its_own_leaves_a_file_to_edit(written: WrittenRuns) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    written.loss = interrupted
    smoa("compare", "studies/two", *NEW[1:], "--seeds", "2", "tolerance=0.2", code=130)
    study = load_study(Path("studies/two/study.yaml"))
    assert ([*study.entries], study.seeds, study.rounds, study.tolerance) == (["lora", "smoa"], [0, 1], None, 0.2)


def test_sizes_have_a_verdict_each_and_one_picture_and_err_by_themselves(room: Path, written: WrittenRuns) -> None:
    told = smoa(*NEW, "--seeds", "2", "--sizes", "1,4").stdout
    assert told.count("Budget: r = ") == 2
    assert [line.split(":")[0] for line in told.splitlines() if line.startswith("r = ")] == ["r = 1", "r = 4"]
    assert (room / "studies" / "chats" / "sizes.png").exists()
    assert "errs by itself" in (room / "studies" / "chats" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*NEW, "--only", "nobody"], "--only: nobody is neither an entry (lora, smoa) nor a budget (all)"),
        ([*NEW, "--methods", "smoa,nobody"], "there is no method 'nobody'"),
        ([*NEW, "--set", "lora.r=3"], "lora can't have the"),
        ([*NEW, "--sizes", "1,two"], "ValueError: invalid literal for int() with base 10: 'two'"),
        ([*NEW, "--set", "dora.lora_alpha=3"], "--set dora: is not one of --methods lora,smoa"),
        ([*NEW, "--sizes", "1,4", "--parameters", "lora:8"], "--sizes and --parameters"),
        ([*NEW, "tuning.max_runs=1"], "tuning.max_runs"),
        *((["compare", *more], "give a study, or both --model and --data") for more in ([], ["--model", "base"])),
        *(
            (["compare", "x", *more], "--data")
            for more in (["--methods", "hira"], ["--sizes", "1"], ["--set", "a.b=1"])
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(words: list[str], told: str, written: WrittenRuns) -> None:
    assert told in smoa(*words, code=1).stderr
    assert written.ran == []


def test_minutes_fit_a_new_study_and_end_one_that_has_runs(written: WrittenRuns) -> None:
    for _ in range(2):
        smoa(*NEW, "--minutes", "60")
        assert len(written.timed) == 2, "then its steps are fixed"
    assert load_study(Path("studies/chats/study.yaml")).shared["training"]["max_steps"] <= 300


def test_a_study_by_a_users_metric_names_it_in_the_command_that_goes_on(room: Path, written: WrittenRuns) -> None:
    (room / "own.py").write_text("def score(answer, row): return float(answer == '4')")
    first = smoa(*NEW, "--seeds", "1", "--metric", "own.py:score").stdout
    assert "--metric own.py:score --seeds 3` goes on" in first
    assert "give --metric" in smoa("compare", "studies/chats", "--report-only", code=1).stderr
    assert "own.py:score" in smoa("compare", "studies/chats", "--report-only", "--metric", "own.py:score").stdout


# tune


@pytest.fixture
def file(room: Path) -> str:
    """Of a run whose rate is searched."""
    values = {
        "model": {"name": "base"},
        "method": "lora",
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"train": "chats.jsonl"},
        "training": {"output_dir": "runs/own", "max_steps": 30, "seed": 3, "use_cpu": True, "learning_rate": 0.0017},
    }
    (room / "own.yaml").write_text(yaml.safe_dump(values))
    return "own.yaml"


def test_tune_is_a_study_of_one_entry_without_final_runs(file: str, room: Path, written: WrittenRuns) -> None:
    ran, number = smoa("tune", file), len(written.ran)
    assert [line.split()[0] for line in ran.stdout.splitlines()[1:4]] == ["9.6e-4", "1.7e-3", "3e-3"]
    assert ran.stdout.splitlines()[-1] == "  learning_rate: 1.9e-3"
    assert "kept was trained at 1.7e-3." in ran.stdout
    assert [path.parent.name for path in room.glob("runs/own-tuning/lora/*/adapter")] == ["lr-1.7e-3-seed-3"]
    assert '"interior": true' in smoa("tune", file, "--json").stdout
    assert len(written.ran) == number
    assert "own-tuning/study.yaml: has another" in smoa("tune", file, "training.max_steps=40", code=1).stderr
    smoa("tune", file, "training.max_steps=40", "training.output_dir=runs/other")


def test_tune_says_where_it_ended_at_its_edge_or_all_diverged(file: str, room: Path, written: WrittenRuns) -> None:
    written.loss = lambda config: -float(config.training["learning_rate"])
    for most in (3, 8):
        assert "--max-runs" in smoa("tune", file, "--max-runs", str(most)).stdout
        assert len([*room.glob("runs/own-tuning/lora/lr-*")]) == most
    written.loss = lambda config: None
    told = smoa("tune", file, "training.output_dir=runs/bad", "--max-runs", "3", code=1).stderr
    assert "every rate down to" in told


# a study that is trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A study of two entries of the same parameters, and its file's folder."""
    room = tmp_path_factory.mktemp("trained")
    rows_base(room / "base")
    write_rows(room / "chats.jsonl", chats(100))
    write_rows(room / "held-out.jsonl", chats(160)[100:])
    targets = ["q_proj", "v_proj"]
    ours, lora = {"r": 4, "num_blocks": 2, "target_modules": targets}, {"r": 2, "target_modules": targets}
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
    values = {
        "shared": {
            "model": {"name": str(room / "base")},
            "data": {"train": str(room / "chats.jsonl"), "test": str(room / "held-out.jsonl"), "samples": 2},
            "forgetting": {"tokens": 128},
            "training": training,
        },
        "tuning": {"max_runs": 0},
        "entries": {
            "ours": {"method": "smoa", "adapter": ours, "learning_rate": 0.01},
            "lora": {"method": "lora", "adapter": lora, "learning_rate": 0.003},
        },
        "keep": "all",
    }
    (room / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        smoa("compare", str(room))
        yield room


def test_a_study_is_run_and_never_run_twice(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_study, "run", lambda config: pytest.fail("a finished run is run again"))
    budget = json.loads(smoa("compare", str(trained), "--json").stdout)["budgets"]["all"]
    assert {one["parameters"] for one in budget["entries"].values()} == {448}
    runs = list(trained.glob("*/lr-*-seed-[012]"))
    assert len(runs) == 2 * budget["round"]
    for run in runs:
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["forgetting"]["change"] is not None
        assert len(metrics["samples"]) == 2


def plain_losses(room: Path, adapter: Path | None = None) -> tuple[list[float], list[int]]:
    """The negative log-likelihood of the assistant's tokens of each row, and their number."""
    tokenizer = AutoTokenizer.from_pretrained(room / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(room / "base")
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    losses, tokens = [], []
    for line in (room / "held-out.jsonl").read_text().splitlines():
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


def test_differences_and_bounds_are_those_of_the_saved_adapters(trained: Path) -> None:
    """test_bounds.py has the formula's own."""
    budget = json.loads((trained / "summary.json").read_text())["budgets"]["all"]
    base, tokens = plain_losses(trained)
    values = [
        [
            plain_losses(trained, next(trained.glob(f"{name}/*-seed-{seed}/adapter")))[0]
            for seed in range(budget["round"])
        ]
        for name in ("ours", "lora")
    ]
    family = Family(
        ("ours", "lora"), np.array(values), np.array([base]), np.array(tokens, float), False, budget["level"]
    )
    for name, other, mean, upper in budget["pairs"]:
        assert mean == pytest.approx(family.of_seeds(name).mean() - family.of_seeds(other).mean(), abs=1e-5)
        assert upper == pytest.approx(family.upper(name, other), abs=1e-5)
    for name, (least, most) in budget["gains"].items():
        assert [least, most] == pytest.approx([-family.upper(name, None), -family.lower(name, None)], abs=1e-5)
