"""A whole study on a tiny random model: what is run, what is resumed, what is refused, what is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from smoa_lab.study.comparison import Comparison, load_study
from smoa_lab.study.report import report
from smoa_lab.study.runner import Runner
from tests.support import lab

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, and questions in the cache."""
    room = tmp_path_factory.mktemp("room")
    lab.tiny_base(room / "base")
    lab.fill_cache(room / "cache", lab.questions(40, "train"), lab.questions(6, "test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        yield room


@pytest.fixture
def values(room: Path, tmp_path: Path) -> dict[str, Any]:
    """Two entries of the same trainable parameters, at one learning rate and seed."""
    targets = ["q_proj", "v_proj"]
    return {
        "folder": str(tmp_path / "study"),
        "shared": {
            "model": {"name": str(room / "base")},
            "data": {"tasks": ["arc_easy"], "train_examples": 8, "validation_examples": 2},
            "training": {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True},
        },
        "tuning": {"max_runs": 0},
        "seeds": [0],
        "entries": {
            "ours": {"method": "smoa", "adapter": {"r": 4, "num_blocks": 2, "target_modules": targets}}
            | {"learning_rate": 0.01, "parameters": 448},
            "lora": {"method": "lora", "adapter": {"r": 2, "target_modules": targets}}
            | {"learning_rate": 0.003, "parameters": 448},
        },
    }


def study_file(values: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_a_study_is_run_reported_and_never_run_twice(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study_file(values | {"tuning": {"max_runs": 3}, "seeds": [0, 1]}, tmp_path)
    ran = CliRunner().invoke(app, ["compare", str(file), "--json"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    rows = {row["entry"]: row for row in json.loads(ran.stdout)}
    assert rows["ours"]["parameters"] == rows["lora"]["parameters"] == 448
    assert rows["ours"]["loss_difference"] is None
    assert rows["lora"]["loss_difference"]["verdict"] in ("better", "same", "worse")
    assert rows["lora"]["seeds"] == [0, 1]
    folder = tmp_path / "study"
    assert len(list(folder.glob("tuning/*/*.json"))) == 6
    assert len(list(folder.glob("final/*/*.json"))) == 4
    for name in ("README.md", "summary.json", "differences.png"):
        assert (folder / name).stat().st_size > 100
    assert not list(folder.glob("work/*/*/*"))
    page = (folder / "index.html").read_text()
    links = set(re.findall(r'"#((?:tuning|final)/[^"]+)"', page))
    assert len(links) == 10
    assert all((folder / f"{name}.json").is_file() and f'id="{name}"' in page for name in links)

    monkeypatch.setattr(Runner, "run", lambda *args: pytest.fail("a finished trial is run again"))
    Comparison(load_study(file)).run()


def test_a_killed_trial_is_run_again(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(study_file(values, tmp_path))
    whole_run = Runner.run

    def killed(self: Runner, entry: Any, *args: Any) -> dict[str, Any]:
        if entry.method == "lora":
            raise KeyboardInterrupt
        return whole_run(self, entry, *args)

    monkeypatch.setattr(Runner, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        Comparison(study).run()
    assert [row["entry"] for row in report(study).summary] == ["ours"]
    assert "Not run yet: lora" in (study.folder / "README.md").read_text()
    monkeypatch.setattr(Runner, "run", whole_run)
    Comparison(study).run()
    assert len(report(study).summary) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-address", "x"], "--ray-address x: must be HOST:PORT"),
        (["--workers", "2", "--report-only"], "--report-only runs nothing"),
        (["--only", "ours", "--report-only"], "--report-only runs nothing"),
        (["--report-only"], "no final run is finished yet"),
        (["--only", "nobody"], "--only: nobody is neither an entry (ours, lora) nor a budget (all)"),
        (["--workers", "0"], "greater than or equal to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(
    values: dict[str, Any], tmp_path: Path, options: list[str], message: str
) -> None:
    refused = CliRunner().invoke(app, ["compare", str(study_file(values, tmp_path)), *options])
    assert refused.exit_code != 0
    assert message in refused.output
    assert not list((tmp_path / "study").glob("*/*"))
