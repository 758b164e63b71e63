"""Reports of studies in all states: half finished, diverged, without a search, of all formats."""

import gzip
import json
import math
import re
from dataclasses import replace
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import RunConfig
from smoa_lab.study.bounds import level_of
from smoa_lab.study.decision import Result
from smoa_lab.study.planning import prepare
from smoa_lab.study.run_study import Comparison
from smoa_lab.study.study import Study, Tuning
from smoa_lab.study.study_charts import losses
from smoa_lab.study.study_report import report
from smoa_lab.training.run_folder import RunFolder
from tests.support.metrics import named
from tests.support.studies import ROWS, WrittenRuns, compared, finished, page

pytestmark = pytest.mark.usefixtures("quick_pictures")


def results(study: Study) -> dict[str, Result]:
    """The results that a study's report has, by entry."""
    comparison = compared(study)
    report(comparison)
    return {one.entry: one for budget in comparison.budgets().values() for one in budget.results}


def rewritten(study: Study, run: str, change: Any) -> None:
    """Change each row of a run."""
    file = study.folder / run / "rows.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        rows = [change(json.loads(line)) for line in lines]
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_study_is_reported_in_words_and_in_a_table_for_programs(study: Study, written: WrittenRuns) -> None:
    made = report(finished(study))
    assert made.verdict[0].startswith(
        "small: ours gained at least 5 % more than lora, after round 2 of 3: take ours, the first in order of cost: "
    )
    text = page(study)
    for told in (made.verdict[0], "The base model: loss 4.0000.", "On 60 held-out rows, best first"):
        assert told in text
    summary = json.loads((study.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["format"] == 4
    assert [one["entry"] for one in summary["entries"]] == ["ours", "lora", "full"]
    assert summary["entries"][1]["worst"]["loss"] > summary["entries"][0]["worst"]["loss"]
    assert (summary["budgets"]["small"]["take"], summary["budgets"]["small"]["round"]) == ("ours", 2)
    files = {file.name for file in study.folder.iterdir() if file.is_file() and not file.name.startswith(".")}
    assert files == {"plan.json", "chosen.json", "README.md", "summary.json", "differences.png"}
    assert summary["answers"][1] == {
        "Prompt": "Why 1?",
        "Reference": "So.",
        "Untouched": "untouched",
        "ours": "smoa 1",
        "lora": "lora 1",
        "full": "full 1",
    }


def test_what_is_not_run_yet_is_told(study: Study, written: WrittenRuns) -> None:
    comparison = compared(study)
    assert report(comparison).verdict == ["0 runs of searches and 0 final runs are done; the rest takes 9 min at most."]
    comparison.run(["lora"])
    found = results(study)
    assert found["lora"].worst == {}
    assert "Not run yet: ours, full." in page(study)
    assert "3 of 6 final runs are done, and bounds are shown from round 2 on." in page(study)
    assert "3 runs of searches and 3 final runs are done; the rest takes " in page(study)
    assert not list(study.folder.glob("*.png"))


def test_rates_are_listed_with_the_chosen_one_and_those_that_diverged(study: Study, written: WrittenRuns) -> None:
    written.loss = lambda config: None if config.training["learning_rate"] > 0.012 else written.usual_loss(config)
    report(finished(study))
    assert re.search(r"\| ours \|[ |]+ 2\.252 \| 2\.000 \* \| diverged \| 1e-2 \|", page(study))
    assert re.search(r"\| full \| 2\.422 \| 2\.228 \* \| 2\.471 \|.* \| 3\.1e-4 \^ \|", page(study))


def test_a_final_run_that_diverged_is_worse_than_any(study: Study, written: WrittenRuns) -> None:
    written.loss = lambda config: (
        None if (config.method, config.training["seed"]) == ("lora", 1) else written.usual_loss(config)
    )
    report(finished(study))
    found = results(study)["lora"]
    assert (found.worst["loss"], found.diverged) == (math.inf, 1)
    summary = json.loads((study.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [one["values"]["loss"] for one in summary["entries"] if one["entry"] == "lora"] == [[None, 0.0]]
    assert "ours is better than lora, which diverged, after round 2 of 3: take ours" in page(study)
    assert "lora diverged in 1 of 2 runs." in page(study)
    assert "| diverged |" in page(study)


@pytest.mark.parametrize(("kind", "measure"), [("choices", "accuracy %")])
def test_a_run_that_diverged_is_worse_than_any_by_shares_too(
    kind: str, measure: str, study: Study, written: WrittenRuns
) -> None:
    written.kind = kind
    written.loss = lambda config: (
        None if (config.method, config.training["seed"]) == ("lora", 1) else written.usual_loss(config)
    )
    report(finished(study))
    found = results(study)
    assert (found["lora"].values[measure], found["lora"].worst[measure]) == ((-math.inf, 0.0), math.inf)
    assert found["ours"].worst[measure] == -math.inf
    assert report(compared(study.model_copy(update={"tolerance": 0.0}))).verdict


def test_before_the_second_round_each_entry_shows_all_its_seeds(study: Study, written: WrittenRuns) -> None:
    written.loss = lambda config: written.usual_loss(config) + int(config.training["seed"]) % 100
    for name in ("ours", "lora"):
        compared(study).run([name])
    for seed in (1, 2):
        rmtree(study.folder / f"lora/lr-2e-3-seed-{seed}")
    assert "4 of 6 final runs are done" in report(compared(study)).verdict[0]
    found = results(study)
    assert [one.seeds for one in (found["ours"], found["lora"])] == [[0, 1, 2], [0]]
    assert found["ours"].values["loss"] == pytest.approx((found["lora"].values["loss"][0] + 0.9, 1.0), abs=0.03)


def test_choices_are_compared_by_accuracy_too_and_a_constant_one_is_no_comparison(
    study: Study, written: WrittenRuns
) -> None:
    written.kind = "choices"
    report(finished(study))
    assert list(results(study)["lora"].worst) == ["loss", "accuracy %"]
    assert "accuracy 25.0 %; the commonest label is right in 60.0 %." in page(study)
    for run in study.folder.glob("*/lr-*"):
        rewritten(study, str(run.relative_to(study.folder)), lambda row: {**row, "right_after": 0})
    assert list(results(study)["lora"].worst) == ["loss"]


def test_where_the_loss_is_the_same_everywhere_accuracy_decides_and_higher_is_better(
    study: Study, written: WrittenRuns
) -> None:
    written.kind = "choices"
    comparison = finished(study)
    for run in study.folder.glob("*/lr-*"):
        rewritten(study, str(run.relative_to(study.folder)), lambda row: {**row, "after": 1.0})
    small = report(comparison).summary["budgets"]["small"]
    assert small["measure"] == "accuracy %"
    assert [one[:3] for one in small["pairs"]] == [["ours", "lora", -0.5], ["lora", "ours", 0.5]]


def test_bounds_are_those_of_whole_rounds_and_seeds_beyond_the_plan_are_looked_at_once(
    study: Study, written: WrittenRuns
) -> None:
    study = study.model_copy(update={"entries": {name: study.entries[name] for name in ("ours", "lora")}})
    first = finished(study)
    assert first.plan.takes["small"].model_dump() == {
        "entry": "ours",
        "round": 2,
        "level": level_of(2, 3),
        "tolerance": 0.1,
        "entries": {name: one.learning_rate for name, one in first.chosen.items()},
    }
    assert len(list(study.folder.glob("*/lr-*-seed-[0-9]"))) == 4, "it ended as soon as it knew"
    more = compared(study, number=5)
    assert (more.plan.extensions, more.plan.takes) == ([5], {})
    more.run(["lora"])
    told = "7 of 10 final runs are done, and bounds are shown from round 5 on. This look was not planned"
    assert report(more).verdict[0].startswith(told)
    more.run()
    made = report(more)
    assert more.plan.takes["small"].level == made.summary["budgets"]["small"]["level"] == 0.005
    assert "after round 5 of 5: take ours" in made.verdict[0]
    assert "This look was not planned at first: it errs in 0.5 %, and all looks in at most 5 %." in made.verdict[0]
    assert report(compared(study, number=5)).verdict == made.verdict


def test_an_entry_that_fails_is_named_and_the_others_get_their_verdict(study: Study, written: WrittenRuns) -> None:
    def loss(config: RunConfig) -> float | None:
        if config.method == "lora":
            raise RuntimeError("CUDA out of memory")
        return written.usual_loss(config)

    written.loss = loss
    made = report(finished(study))
    assert any(told.startswith("lora failed: RuntimeError: CUDA out of memory; the same") for told in made.verdict)
    assert made.verdict[0].startswith("small: ours gained ")
    assert made.summary["budgets"]["small"]["level"] == level_of(2, 3), "it counts as one of two"
    kept = study.model_copy(update={"entries": {n: e for n, e in study.entries.items() if n != "lora"}})
    dropped = report(finished(kept))
    assert not any("failed" in told for told in dropped.verdict)
    written.loss = written.usual_loss
    assert report(finished(study)).summary["budgets"]["small"]["pairs"], "it may come back"


def test_an_entry_that_failed_and_now_works_is_compared_by_one_more_look(study: Study, written: WrittenRuns) -> None:
    broken = {"lora": 1}

    def loss(config: RunConfig) -> float | None:
        if config.training["seed"] == broken.get(config.method):
            raise RuntimeError("CUDA out of memory")
        return 1.5 if config.method == "lora" and config.training["seed"] < 100 else written.usual_loss(config)

    written.loss = loss
    first = finished(study)
    takes = first.plan.takes
    assert takes["small"].entries.keys() == {"ours"}
    again = finished(study)
    assert (again.plan.takes, again.plan.extensions) == (takes, []), "as long as it fails there is no other look"
    compared(study).run(["full"])
    assert compared(study).plan.failed.keys() == {"lora"}, "only others were to run"
    assert report(again).summary["budgets"]["small"]["take"] == "ours"
    broken.clear()
    works = finished(study)
    made = report(works)
    assert works.plan.extensions == [3]
    assert works.plan.takes["small"].entry == made.summary["budgets"]["small"]["take"] == "lora"
    assert works.plan.takes["large"] == takes["large"], "nothing of it changed"
    large = made.summary["budgets"]["large"]
    assert (large["take"], large["level"], large["round"]) == ("full", takes["large"].level, 2)
    assert "not planned at first" in made.verdict[0]
    assert "not planned at first" not in made.verdict[1]


def test_two_processes_count_an_entry_that_works_again_once(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(config: RunConfig) -> float | None:
        if config.method == "lora":
            raise RuntimeError("CUDA out of memory")
        return written.usual_loss(config)

    written.loss = loss
    finished(study)
    written.loss = written.usual_loss
    both = compared(study), compared(study)
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_decide", lambda self, only=(): None)
        for each in both:
            each.run()
    for each in both:
        each._decide()
    assert both[1].plan.extensions == [3]
    assert both[1].plan.takes["small"].entries.keys() == {"ours", "lora"}


def test_a_taken_entry_that_is_dropped_is_taken_no_more(study: Study, written: WrittenRuns) -> None:
    finished(study)
    kept = study.model_copy(update={"entries": {n: e for n, e in study.entries.items() if n != "ours"}})
    dropped = finished(kept)
    assert dropped.plan.extensions == [3]
    assert dropped.plan.takes["small"].entry == "lora"
    assert report(dropped).summary["budgets"]["small"]["take"] == "lora"


def test_a_report_without_some_entries_counts_them_and_its_look_as_a_run_would(
    study: Study, written: WrittenRuns
) -> None:
    finished(study)
    full = compared(study).plan
    kept = study.model_copy(update={"entries": {"lora": study.entries["lora"]}, "seeds": [0, 1, 2, 3]})
    for _ in range(2):
        reported = Comparison(kept, prepare(kept, None))
        small = report(reported).summary["budgets"]["small"]
        assert (reported.plan.dropped, reported.plan.extensions) == ({"ours": "small", "full": "large"}, [3])
        assert (small["level"], small["take"], reported.plan.seeds) == (0.005, None, full.seeds)
        assert reported.budgets()["small"].families["loss"].entries == 2
    again = compared(study).plan
    assert (again.dropped, again.extensions) == ({}, []), "a report notes nothing"


def test_a_report_with_an_entry_that_came_back_leaves_it_to_be_planned(study: Study, written: WrittenRuns) -> None:
    finished(study)
    names = ("lora", "full")
    finished(study.model_copy(update={"entries": {name: study.entries[name] for name in names}}))
    timed = len(written.timed)
    prepare(study.model_copy(update={"entries": {name: study.entries[name] for name in ("ours", "lora")}}), None)
    assert finished(study).plan.dropped == {}
    assert len(written.timed) == timed + 1


def test_an_entry_whose_rate_changed_is_run_and_compared_again(study: Study, written: WrittenRuns) -> None:
    entries = {name: study.entries[name] for name in ("ours", "lora")}
    entries["ours"] = entries["ours"].model_copy(update={"learning_rate": 0.01 / 30})
    study = study.model_copy(update={"entries": entries})
    written.loss = lambda config: written.usual_loss(config) + (2.0 if config.method == "lora" else 0.0)
    first = finished(study)
    assert (first.chosen["ours"].place, first.plan.takes["small"].entry) == ("edge", "ours")
    more = finished(study.model_copy(update={"tuning": Tuning(max_runs=12)}))
    rate = more.chosen["ours"].learning_rate
    assert rate != first.chosen["ours"].learning_rate
    assert more.plan.takes["small"].entries["ours"] == rate
    assert more.plan.extensions == [3]
    assert report(more).summary["budgets"]["small"]["take"] == "ours"


def test_what_an_older_plan_decided_stands(study: Study, written: WrittenRuns) -> None:
    takes = finished(study).plan.takes
    file = study.folder / "plan.json"
    stored = json.loads(file.read_text())
    for take in stored["takes"].values():
        del take["entries"]
    file.write_text(json.dumps(stored))
    ran = len(written.ran)
    again = finished(study)
    assert {name: take.entry for name, take in again.plan.takes.items()} == {n: t.entry for n, t in takes.items()}
    assert (len(written.ran), again.plan.extensions) == (ran, [])
    assert report(again).summary["budgets"]["small"]["take"] == "ours"


def test_rounds_that_an_open_budget_asks_for_leave_the_answers_of_others(study: Study, written: WrittenRuns) -> None:
    written.loss = lambda config: (
        written.usual_loss(config)
        + 0.3 * (config.method != "full") * ((int(config.training["seed"]) + (config.method == "lora")) % 3)
    )
    takes = finished(study).plan.takes
    assert takes.keys() == {"large"}
    more = compared(study, number=6)
    assert (more.plan.extensions, more.plan.takes) == ([6], takes)
    more.run()
    assert report(more).summary["budgets"]["large"]["level"] == takes["large"].level
    assert len(list(study.folder.glob("full/lr-*-seed-[0-9]"))) == 2


def test_rounds_that_only_some_entries_at_a_time_ran_are_compared_by_a_command_without_only(
    study: Study, written: WrittenRuns
) -> None:
    written.loss = lambda config: (
        written.usual_loss(config) + 2.0 * (config.training["seed"] == 2) * (1 if config.method == "smoa" else -0.1)
    )
    for name in ("ours", "lora", "full"):
        compared(study).run([name])
    told = report(compared(study)).verdict[0]
    assert told.startswith("small: No verdict yet: `smoa compare "), told
    assert "`, without --only, compares the rounds that there are." in told
    ran = len(written.ran)
    made = report(finished(study))
    assert (made.summary["budgets"]["small"]["take"], len(written.ran)) == ("ours", ran)


def test_a_changed_tolerance_asks_again_without_another_look(study: Study, written: WrittenRuns) -> None:
    finished(study)
    strict = compared(study.model_copy(update={"tolerance": 0.05, "keep": "all"}))
    assert (strict.plan.takes, strict.plan.extensions) == ({}, [])


def test_unequal_batches_are_told(study: Study, written: WrittenRuns) -> None:
    large = study.entries["lora"].model_copy(update={"training": {"gradient_accumulation_steps": 4}})
    made = report(finished(study.model_copy(update={"entries": {**study.entries, "lora": large}})))
    assert "Entries see unequal numbers of rows: 8 to 32 in each of the same number of steps." in made.verdict


def test_a_damaged_file_is_named(study: Study, written: WrittenRuns) -> None:
    finished(study)
    for name in ("chosen.json", "lora/lr-2e-3-seed-0/metrics.json", "plan.json"):
        file = study.folder / name
        whole = file.read_text()
        file.write_text(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{name}: is damaged"):
            report(compared(study))
        file.write_text(whole)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_rows_that_were_cut_off_are_named(kept: float, study: Study, written: WrittenRuns) -> None:
    finished(study)
    file = study.folder / "lora" / "lr-2e-3-seed-0" / "rows.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=r"seed-0/rows\.jsonl\.gz: is damaged.*; put back a copy, or remove this run's"):
        report(compared(study))
    rmtree(file.parent)
    finished(study)


def test_a_study_is_shown_after_each_run_without_differences_and_a_resumed_one_says_first_what_is_done(
    study: Study, written: WrittenRuns, caplog: pytest.LogCaptureFixture
) -> None:
    pages: list[str] = []

    def show(comparison: Comparison) -> None:
        report(comparison)
        pages.append(page(study))

    compared(study).run(["lora"])
    caplog.set_level("INFO")
    compared(study).run(show=show)
    assert "3 runs of searches and 3 final runs are done; the rest takes" in caplog.text
    assert len(pages) == len(written.ran) - 8 - 1  # the last run's is made by who runs it
    assert [text.count("| ours | ") for text in pages[:2]] == [1, 1]  # its search
    assert [" more than lora, after round 2" in text for text in pages][-1]


def test_runs_are_paired_by_row_and_copies_of_a_row_count_as_one(study: Study, written: WrittenRuns) -> None:
    made, found = report(finished(study)), results(study)
    for file in study.folder.rglob("rows.jsonl.gz"):
        lines = gzip.decompress(file.read_bytes())
        lines += lines.replace(b'"copy": 0', b'"copy": 1')
        if "lora" in file.parts:  # in another order
            lines = b"".join(reversed(lines.splitlines(keepends=True)))
        file.write_bytes(gzip.compress(lines))
    assert results(study) == {name: replace(one, rows=2 * ROWS) for name, one in found.items()}
    again, once = (each.summary["budgets"]["small"] for each in (report(compared(study)), made))
    assert (again["pairs"], again["gains"]) == (once["pairs"], once["gains"])
    assert f"On {2 * ROWS} held-out rows of {ROWS} groups" in page(study)


def test_a_report_names_no_place_of_this_machine(
    study: Study, written: WrittenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = study.model_copy(update={"folder": Path("studies/chats")})
    report(finished(study))
    for file in ("README.md", "summary.json", "plan.json"):
        assert str(tmp_path) not in (study.folder / file).read_text()


def by(study: Study, metric: str | None) -> Study:
    """The study with a metric."""
    return study.model_copy(update={"shared": {**study.shared, "data": {"train": "chats.jsonl", "metric": metric}}})


def test_a_metric_decides_and_another_scores_the_stored_answers_again_without_a_run(
    study: Study, written: WrittenRuns
) -> None:
    made = report(finished(by(study, "contains")))
    small = made.summary["budgets"]["small"]
    assert (small["measure"], small["take"]) == ("contains %", "ours")
    assert small["pairs"][0][:3] == ["ours", "lora", -0.25]
    assert list(results(by(study, "contains"))["lora"].values) == ["contains %", "loss"]
    ran = len(written.ran)
    asked_again = report(compared(by(study, "exact")))
    again = asked_again.summary["budgets"]["small"]
    assert (again["measure"], again["pairs"][0][2]) == ("exact %", -0.25)
    assert again["level"] == 0.005, "another metric is another look"
    told = [made.summary["untouched"], asked_again.summary["untouched"]]
    assert [{"exact", "contains"} & each.keys() for each in told] == [{"contains"}, {"exact"}]
    assert ["right answers (exact)" in each.notes[0] for each in (made, asked_again)] == [False, True]
    assert len(written.ran) == ran
    for other in ("choice", None):
        with pytest.raises(ConfigError, match=r'shared\.data\.metric: "exact", now (null|"choice")'):
            compared(by(study, other))


RIGHT = "def score(answer, row): return {'4': 3.0, 'It is 4': 1.5}.get(answer, 0.0)"
LEVELS = "def score(answer, row): return float(row['level'])"


def test_a_users_metric_decides_and_a_mended_one_scores_the_stored_answers_again(
    study: Study, written: WrittenRuns, tmp_path: Path
) -> None:
    own = by(study, "score")
    with named(tmp_path / "own.py", RIGHT):
        made = report(finished(own))
        small, ran = made.summary["budgets"]["small"], len(written.ran)
        assert (small["measure"], small["pairs"][0][:3]) == ("score", ["ours", "lora", -0.75])
        assert list(results(own)["lora"].values) == ["score", "loss"]
    stored = report(Comparison(own, prepare(own, None)))
    assert stored.summary == made.summary
    digest = sha256(RIGHT.encode()).hexdigest()[:16]
    note = f"The score is the mean of own.py:score over rows; SHA-256 of the file: {digest}."
    assert note in made.notes == stored.notes
    with named(tmp_path / "own.py", LEVELS):
        mended = report(Comparison(own, prepare(own, None)))
        assert mended.summary["untouched"]["score"] == 1.0
    assert report(Comparison(own, prepare(own, None))).summary == mended.summary
    assert len(written.ran) == ran


def test_what_a_users_metric_may_read_of_the_rows_stays_as_planned_and_others_ignore_it(
    study: Study, written: WrittenRuns, tmp_path: Path
) -> None:
    written.digests["own"] = "a"
    finished(by(study, "contains"))
    written.digests["own"] = "b"
    compared(by(study, "contains"))
    own = by(study, "score").model_copy(update={"folder": tmp_path / "own"})
    with named(tmp_path / "own.py", RIGHT):
        finished(own)
        written.digests["own"] = "c"
        with pytest.raises(ConfigError, match="what --metric may read of the held-out rows changed"):
            compared(own)
    compared(by(own, "exact"))  # which reads the completions alone


def test_an_entry_that_the_users_metric_fails_to_score_is_one_that_failed(
    study: Study, written: WrittenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: RunConfig) -> dict[str, Any]:
        metrics = written.run(config)
        if config.method == "lora" and config.training["seed"] == 1:
            place = config.folder.relative_to(study.folder)
            rewritten(study, str(place), lambda row: {k: v for k, v in row.items() if not k.startswith("scored")})
            raise DataError("the metric fails on an answer")
        return metrics

    monkeypatch.setattr("smoa_lab.study.executor.run", run)
    own = by(study, "score")
    with named(tmp_path / "own.py", RIGHT):
        compared(own).run(show=report)
    comparison = Comparison(own, prepare(own, None))
    assert comparison.plan.takes["small"].entries.keys() == {"ours"}
    assert "lora failed: the metric fails on an answer; the same" in " ".join(report(comparison).verdict)
    with named(tmp_path / "own.py", RIGHT):  # now it scores that answer
        again = finished(own)
    assert again.plan.takes["small"].entries.keys() == {"ours", "lora"}
    assert again.plan.failed == {}


def test_a_function_that_fails_on_a_stored_answer_leaves_the_study_as_it_was_scored(
    study: Study, written: WrittenRuns, tmp_path: Path
) -> None:
    own = by(study, "score")
    with named(tmp_path / "own.py", RIGHT):
        made = report(finished(own))
    failing, told = "def score(answer, row): return {'4': 1.0}[answer]", r"^rows\.jsonl, row 1: .* 'It is 4': KeyError"
    with named(tmp_path / "own.py", failing), pytest.raises(DataError, match=told):
        report(Comparison(own, prepare(own, None)))
    assert report(Comparison(own, prepare(own, None))).summary == made.summary


def begin_to_score_again(own: Study, metric: Path, killed_at: str) -> None:
    """Let LEVELS score stored answers, until the command is killed before it writes the rows of a run of this name."""
    whole = RunFolder.write_rows

    def write_rows(run: RunFolder, lines: Any) -> None:
        if fnmatch(run.path.name, killed_at):
            raise KeyboardInterrupt
        whole(run, lines)

    with pytest.MonkeyPatch.context() as patch, named(metric, LEVELS):
        patch.setattr(RunFolder, "write_rows", write_rows)
        with pytest.raises(KeyboardInterrupt):
            prepare(own, None)


def test_answers_that_another_function_began_to_score_again_are_never_mixed(
    study: Study, written: WrittenRuns, tmp_path: Path
) -> None:
    own = by(study, "score")
    with named(tmp_path / "own.py", RIGHT):
        report(finished(own))
    begin_to_score_again(own, tmp_path / "own.py", "lr-2e-3-seed-1")
    with pytest.raises(DataError, match=r"began to score its answers again, .*; give --metric own\.py:score, and it"):
        prepare(own, None)
    with named(tmp_path / "own.py", LEVELS):
        again = report(Comparison(own, prepare(own, None)))
    assert {pair[2] for pair in again.summary["budgets"]["small"]["pairs"]} == {0.0}
    assert again.summary["budgets"]["small"]["level"] == 0.005, "another function is another look"
    assert report(Comparison(own, prepare(own, None))).summary == again.summary


def test_answers_that_a_users_function_began_to_score_after_a_rule_say_what_to_give(
    study: Study, written: WrittenRuns, tmp_path: Path
) -> None:
    finished(by(study, "exact"))
    own = by(study, "score")
    begin_to_score_again(own, tmp_path / "own.py", "*")
    with pytest.raises(DataError, match=r"give --metric FILE\.py:NAME, and it goes on"):
        prepare(own, None)
    with named(tmp_path / "own.py", LEVELS):
        assert report(Comparison(own, prepare(own, None))).summary["untouched"]["score"] == 1.0


def test_a_search_goes_on_with_the_seeds_asked_for_and_has_a_verdict(study: Study, written: WrittenRuns) -> None:
    search = study.model_copy(update={"seeds": [], "tuning": Tuning(seed=0)})
    finished(search)
    comparison = compared(search, number=3)
    assert (comparison.plan.seeds, comparison.plan.final > 0) == ([1, 2, 3], True)
    comparison.run()
    assert report(comparison).verdict[0].startswith("small: ours gained at least")
    rmtree(study.folder / "untouched")  # as of a version that didn't score it
    assert report(finished(search)).verdict[0].startswith("small: ours gained at least")


def test_a_study_that_goes_on_without_the_users_metric_says_what_to_give(
    study: Study, written: WrittenRuns, tmp_path: Path
) -> None:
    own = by(study, "score").model_copy(update={"seeds": [0]})
    with named(tmp_path / "own.py", RIGHT):
        made = report(finished(own))
    assert f"`smoa compare {study.folder}/study.yaml --metric own.py:score --seeds 3` goes on" in made.verdict[0]
    with pytest.raises(ConfigError, match=r"data\.metric: score is a function .* give --metric own\.py:score$"):
        compared(own)
    numbers = by(study, "number").model_copy(update={"seeds": [0]})
    assert report(compared(numbers)).summary["budgets"]["small"]["measure"] == "number %"


def test_a_run_that_diverged_loses_by_a_metric_too(study: Study, written: WrittenRuns) -> None:
    written.loss = lambda config: (
        None if config.training["seed"] == 1 and config.method == "smoa" else written.usual_loss(config)
    )
    report(finished(by(study, "contains")))
    assert "lora is better than ours, which diverged, after round 2 of 3: take lora" in page(study)
    assert [one["values"]["contains %"] for one in json.loads((study.folder / "summary.json").read_text())["entries"]][
        1
    ] == [None, 0.0]


@pytest.mark.usefixtures("no_looks")
def test_where_no_answer_is_right_nothing_was_gained_whatever_the_loss(study: Study, written: WrittenRuns) -> None:
    finished(by(study, "exact"))
    for run in study.folder.glob("*/lr-*"):
        rewritten(study, str(run.relative_to(study.folder)), lambda row: {**row, "answer_after": "5"})
    made = report(compared(by(study, "exact")))
    assert made.verdict[0].startswith("small: Training gained nothing that could be shown, after round 3 of 3: take")
    assert list(results(by(study, "exact"))["lora"].values) == ["exact %", "loss"]
    assert "| 0.0 ± 0.0 |" in page(study)
    assert "| -0.0 ±" not in page(study)


def test_other_work_beside_some_runs_makes_no_entry_dearer(study: Study, written: WrittenRuns) -> None:
    finished(study)
    before = {name: one.step_seconds for name, one in results(study).items()}
    for run in study.folder.glob("lora/lr-*"):
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["training"]["seconds"] *= 3
        (run / "metrics.json").write_text(json.dumps(metrics))
    assert {name: one.step_seconds for name, one in results(study).items()} == pytest.approx(before)


def test_a_resumed_run_is_drawn_at_the_pace_of_the_plan_and_its_seconds_are_left_out(
    study: Study, written: WrittenRuns
) -> None:
    step = finished(study).plan.entries["lora"].step
    file = study.folder / "lora" / "lr-2e-3-seed-0" / "metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps({**metrics, "training": {**metrics["training"], "seconds": 1.0, "resumed": True}}))
    lora = results(study)["lora"]
    (points,) = losses([lora], compared(study).finals()).to_dict()["datasets"].values()
    assert points[-1]["seconds"] == pytest.approx(100 * step)
    assert re.search(r"lora/lr-2e-3-seed-0 \|.*\| 100 \| – \|", page(study))
    assert re.search(r"lora/lr-2e-3-seed-1 \|.*\| 100 \| 10 \|", page(study))


def test_the_adapter_that_is_kept_is_the_one_that_is_named_also_of_a_round_that_is_not_shown(
    study: Study, written: WrittenRuns
) -> None:
    written.loss = lambda config: written.usual_loss(config) - 0.001 * (config.training["seed"] == 2)
    compared(study).run(["ours"])
    made = finished(study)
    assert made.plan.takes["small"].round == 2
    report(made)
    kept = [path.parent for path in study.folder.glob("ours/*/adapter")]
    assert [str(path) for path in kept] == [results(study)["ours"].kept]
    assert kept[0].name.endswith("seed-2")


def test_by_a_metric_the_adapter_that_answers_best_is_kept(study: Study, written: WrittenRuns) -> None:
    row = written._row

    def answered(number: int, value: float | None, config: RunConfig) -> dict[str, Any]:
        told = row(number, value, config)
        is_best = config.training["seed"] == 1 and "answer_after" in told
        return told | ({"answer_after": "4"} if is_best else {})

    written.loss = lambda config: written.usual_loss(config) + 0.1 * int(config.training["seed"] == 1)
    written._row = answered  # type: ignore[method-assign]
    report(finished(by(study, "exact")))
    assert [path.parent.name for path in study.folder.glob("ours/*/adapter")] == ["lr-1e-2-seed-1"]
