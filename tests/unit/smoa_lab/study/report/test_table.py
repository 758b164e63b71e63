"""Reports of studies in all states: half finished, diverged, without a search, without what was known before."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run_config import RunConfig
from smoa_lab.study.comparison import Comparison, stored_search, validation_loss
from smoa_lab.study.packing import PACK, pack
from smoa_lab.study.report.table import report
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial, TrialStore
from tests.support import lab

QUESTIONS = 40


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two entries of one budget and a third of another; nothing is run yet."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return Study(
        folder=tmp_path / "study",
        shared={"model": {"name": "base"}, "data": {"tasks": ["arc_easy"]}, "training": {"use_cpu": True}},
        entries={
            "ours": {"method": "smoa", "learning_rate": 0.01, "budget": "small"},
            "lora": {"method": "lora", "learning_rate": 0.01, "budget": "small"},
            "full": {"method": "full", "learning_rate": 0.001, "budget": "large"},
        },
    )


def finish(study: Study, trial: Trial, loss: float | None, **values: Any) -> None:
    """Store the result of a trial, with the same loss on every question; None is a run that diverged."""
    result = {
        "config": {"training": {"learning_rate": trial.learning_rate, "seed": trial.seed}},
        "parameters": 1000,
        "seconds": 7.0,
        "scores": {"all": {"gold_loss": loss, "accuracy": 0.5, "majority": None}},
        "questions": {
            "task": ["arc_easy"] * QUESTIONS,
            "nll": [None if loss is None else loss + i / QUESTIONS for i in range(QUESTIONS)],
            "tokens": [1] * QUESTIONS,
            "right": [int(loss is not None and i % 2 == 0) for i in range(QUESTIONS)],
        },
    }
    file = TrialStore(study.folder).file(trial.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | values))


def page(study: Study) -> str:
    return (study.folder / "README.md").read_text()


def test_a_first_final_run_is_reported_without_search_or_differences(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    (row,) = report(study)
    assert (row.entry, row.reference, row.search, row.elsewhere) == ("ours", "ours", None, None)
    assert (row.loss_spread, row.seconds) == (0.0, 7.0)
    text = page(study)
    assert "Not run yet: lora, full." in text
    assert ".png" not in text
    assert "untouched" not in text
    assert not list(study.folder.glob("*.png"))
    assert "Learning rates" not in (study.folder / "index.html").read_text()


def test_one_seed_gets_no_verdict_and_two_do(study: Study) -> None:
    for seed in (0, 1):
        finish(study, Trial("final", "ours", 0.01, seed), 2.0)
        finish(study, Trial("final", "lora", 0.01, seed), 2.5)
        rows = {row.entry: row for row in report(study)}
        assert rows["lora"].loss_difference is not None
        assert rows["lora"].loss_difference.verdict == ("one seed", "worse")[seed]
    assert "+0.5000 [+0.5000, +0.5000] | worse" in page(study)


def test_seeds_that_only_one_has_are_not_compared(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    finish(study, Trial("final", "lora", 0.01, 1), 2.5)
    rows = {row.entry: row for row in report(study)}
    assert rows["lora"].loss_difference is rows["lora"].accuracy_difference is None


def test_every_budget_has_its_own_table_and_reference(study: Study) -> None:
    for name, rate in (("ours", 0.01), ("lora", 0.01), ("full", 0.001)):
        finish(study, Trial("final", name, rate, 0), 2.0)
    assert {row.entry: row.reference for row in report(study)} == {"ours": "ours", "lora": "ours", "full": "full"}
    text = page(study)
    assert text.index("## Budget: large") < text.index("## Budget: small")


def test_a_search_that_ends_at_its_edge_is_marked_and_a_diverged_run_never_chosen(study: Study) -> None:
    for rate, loss in ((0.003, 2.2), (0.01, 2.1), (0.03, None)):
        finish(study, Trial("tuning", "ours", rate, 100), loss)
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    for rate, loss in ((0.003, 2.2), (0.01, 2.1), (0.03, 1.9)):
        finish(study, Trial("tuning", "lora", rate, 100), loss)
    finish(study, Trial("final", "lora", 0.01, 0), 2.0)  # at a learning rate that the search gave up
    finish(study, Trial("final", "lora", 0.03, 0), 1.8)
    rows = {row.entry: row for row in report(study)}
    assert rows["ours"].search is not None
    assert rows["ours"].search.losses == {0.003: 2.2, 0.01: 2.1, 0.03: None}
    assert rows["ours"].search.interior
    assert rows["lora"].loss == pytest.approx(1.8 + (QUESTIONS - 1) / QUESTIONS / 2)
    text = page(study)
    assert "| 0.03 ! |" in text
    assert "| 0.01 |" in text
    assert (study.folder / "learning_rates.png").stat().st_size > 100


def test_a_final_run_that_diverged_is_worse_than_any(study: Study) -> None:
    for seed in (0, 1):
        finish(study, Trial("final", "ours", 0.01, seed), 2.0)
        finish(study, Trial("final", "lora", 0.01, seed), None)
    rows = {row.entry: row for row in report(study)}
    assert rows["lora"].loss_difference is not None
    assert rows["lora"].loss_difference.verdict == "worse"
    summary = json.loads((study.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [one["loss"] for one in summary if one["entry"] == "lora"] == [None]


def test_a_trial_that_diverged_is_stored_as_json_that_others_can_read(tmp_path: Path) -> None:
    result = {"config": {"training": {}}, "scores": {"all": {"gold_loss": math.inf}}, "questions": {"nll": [math.nan]}}
    store = TrialStore(tmp_path)
    first = store.get("final/lora/x", {}, lambda work: result)
    assert json.loads(store.file("final/lora/x").read_text(), parse_constant=pytest.fail) == first
    assert (first["scores"]["all"]["gold_loss"], first["questions"]["nll"]) == (None, [None])


def test_accuracy_is_told_task_by_task(study: Study) -> None:
    for seed in (0, 1):
        scores = {name: {"accuracy": share + seed / 10} for name, share in (("piqa", 0.5), ("boolq", 0.3))}
        scores["all"] = {"gold_loss": 2.0, "accuracy": 0.4 + seed / 10, "majority": None}
        finish(study, Trial("final", "ours", 0.01, seed), 2.0, scores=scores)
    untouched = {"gold_loss": 4.0, "accuracy": 0.25, "majority": None}
    scores = {"piqa": {"accuracy": 0.4}, "boolq": {"accuracy": 0.2}, "all": untouched}
    (study.folder / "untouched.json").write_text(json.dumps({"scores": scores}))
    report(study)
    assert (
        "| entry | piqa | boolq | mean |\n|---|--:|--:|--:|\n| ours | 55.0 | 35.0 | 45.0 |\n| untouched | 40.0"
        in page(study)
    )


def test_what_was_known_before_is_told(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0, elsewhere=3.0)
    scores = {"all": {"gold_loss": 4.0, "accuracy": 0.25, "majority": 0.6}}
    (study.folder / "untouched.json").write_text(json.dumps({"scores": scores, "elsewhere": 3.5}))
    assert report(study)[0].elsewhere == 3.0
    told = "The untouched model: loss 4.0000, accuracy 25.0 %; the commonest label of each task is right in 60.0 %; "
    assert f"{told}its loss elsewhere is 3.500." in page(study)
    scores["all"]["majority"] = None
    (study.folder / "untouched.json").write_text(json.dumps({"scores": scores}))
    report(study)
    assert "The untouched model: loss 4.0000, accuracy 25.0 %.\n" in page(study)


def test_the_untouched_model_is_scored_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.fill_cache(study.folder.with_name("cache"), lab.questions(4, "train"), lab.questions(4, "test"))
    comparison = Comparison(study)
    calls: list[str] = []

    def score(config: RunConfig, part: str) -> dict[str, Any]:
        calls.append(part)
        return {"config": config.model_dump(mode="json"), "scores": {}}

    monkeypatch.setattr(comparison.bench, "untouched", score)
    assert comparison.untouched() == comparison.untouched()
    assert calls == ["test"]
    comparison.bench.shared["training"] = {"use_cpu": True, "max_steps": 3}
    comparison.untouched()  # no training took place
    comparison.bench.shared["data"] = {"tasks": ["arc_easy"], "test_examples": 2}
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of data"):
        comparison.untouched()


def test_the_untouched_model_of_a_quantised_study_is_described_without_training(study: Study) -> None:
    """Full fine-tuning of quantised weights is refused, and is not what is asked for."""
    in_4_bits = {"quantization_config": {"load_in_4bit": True}}
    shared = {**study.shared, "model": {"name": "base", "options": in_4_bits}}
    config = study.model_copy(update={"shared": shared}).bench().untouched_config(study.entries["ours"])
    assert (config.method, config.adapter, config.model.options) == ("full", {}, in_4_bits)
    assert "learning_rate" not in config.training


def test_runs_on_different_questions_are_not_compared(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0, sha256="one")
    finish(study, Trial("final", "lora", 0.01, 0), 2.5, sha256="another")
    with pytest.raises(DataError, match="were scored on different questions"):
        report(study)


def test_a_search_of_another_seed_is_no_part_of_this_one(study: Study) -> None:
    finish(study, Trial("tuning", "ours", 0.01, 100), 2.0)
    finish(study, Trial("tuning", "ours", 0.03, 7), 1.0)
    search = stored_search(study, "ours")
    assert search is not None
    assert search.learning_rate == 0.01


def test_the_seconds_of_resumed_runs_are_left_out(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0, seconds=None)
    assert report(study)[0].seconds is None
    finish(study, Trial("final", "ours", 0.01, 1), 2.0)
    assert report(study)[0].seconds == 7.0


def test_a_reference_that_diverged_makes_nobody_worse(study: Study) -> None:
    for seed in (0, 1):
        finish(study, Trial("final", "ours", 0.01, seed), None)
        finish(study, Trial("final", "lora", 0.01, seed), 2.0)
    rows = {row.entry: row for row in report(study)}
    assert rows["lora"].loss_difference is not None
    assert rows["lora"].loss_difference.verdict == "better"


def test_before_the_first_run_there_is_no_search(study: Study) -> None:
    assert stored_search(study, "ours") is None
    finish(study, Trial("tuning", "ours", 0.01, 100), None)
    found = stored_search(study, "ours")
    assert found is not None
    assert found.losses == {0.01: None}
    assert not found.interior


def test_a_run_with_one_question_without_a_loss_has_diverged() -> None:
    scores = {"all": {"gold_loss": 1.5}}
    assert validation_loss({"questions": {"nll": [1.0, 2.0]}, "scores": scores}) == 1.5
    assert validation_loss({"questions": {"nll": [1.0, None]}, "scores": scores}) is None


def test_seconds_are_those_of_the_machine_that_made_most_runs(study: Study) -> None:
    fast, slow = ({"provenance": {"device": device, "threads": 1}} for device in ("fast", "slow"))
    for seed, machine, seconds in ((0, slow, 70.0), (1, slow, 80.0), (2, fast, 10.0)):
        finish(study, Trial("final", "ours", 0.01, seed), 3.0, seconds=seconds, **machine)
    finish(study, Trial("final", "lora", 0.01, 0), 3.0, seconds=5.0, **fast)
    finish(study, Trial("final", "full", 0.001, 0), 3.0, seconds=None, **slow)
    assert {row.entry: row.seconds for row in report(study)} == {"ours": 75.0, "lora": None, "full": None}


def finish_a_study(study: Study) -> None:
    """Searches and final runs of two entries, one of them diverged at a rate, and the untouched model."""
    for name, rate, loss in (("ours", 0.003, 2.2), ("ours", 0.01, 2.1), ("ours", 0.03, None), ("lora", 0.01, 2.3)):
        finish(study, Trial("tuning", name, rate, 100), loss)
    for seed in (0, 1):
        finish(
            study, Trial("final", "ours", 0.01, seed), 2.0, steps=60, provenance={"device": "a CPU", "commit": "c" * 40}
        )
        finish(study, Trial("final", "lora", 0.01, seed), 2.5)
    scores = {"all": {"gold_loss": 4.0, "accuracy": 0.25, "majority": 0.6}}
    (study.folder / "untouched.json").write_text(json.dumps({"scores": scores}))


def test_a_packed_study_has_the_same_report_to_the_byte(study: Study) -> None:
    finish_a_study(study)
    report(study)
    files = [file for file in study.folder.iterdir() if file.is_file() and file.name != "untouched.json"]
    before = {file.name: file.read_bytes() for file in files}
    assert sorted(before) == ["README.md", "differences.png", "index.html", "learning_rates.png", "summary.json"]
    pack(study.folder)
    for name in before:
        (study.folder / name).unlink()
    report(study)
    after = {file.name: file.read_bytes() for file in study.folder.iterdir() if file.is_file()}
    assert after.pop(PACK)
    assert after == before


@pytest.mark.parametrize("packed", [False, True])
def test_every_link_of_a_report_leads_to_its_run(study: Study, packed: bool) -> None:
    finish_a_study(study)
    if packed:
        pack(study.folder)
    report(study)
    html = (study.folder / "index.html").read_text()
    lines = dict(re.findall(r'<tr><td><span id="([^"]+)">[^<]+</span></td>(.*?)</tr>', html))
    assert sorted(lines) == TrialStore(study.folder).names()
    links = set(re.findall(r'href="#((?:final|tuning)/[^"]+)"', html))
    assert links == {name for name in lines if name not in ("untouched", "tuning/ours/lr-0.03-seed-100")}
    values = re.findall(r"<td>([^<]*)</td>", lines["final/ours/lr-0.01-seed-0"])
    assert values == ["2.0000", "50.0", "60", "7", "a CPU", "ccccccc"]
    assert lines["tuning/ours/lr-0.03-seed-100"].startswith("<td>diverged</td>")
    command = """gzip -dc runs.jsonl.gz | grep -F '"name":"final/ours/'"""
    assert f"`{command}`" in page(study)
    assert command in html.replace("&quot;", '"').replace("&#x27;", "'")
