"""What a study's report says of its runs. Nothing is trained."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import run_study
from smoa_lab.study.finished import read_finished
from smoa_lab.study.report import Report, report
from smoa_lab.study.run_study import work
from smoa_lab.study.study import edit, load_study
from tests.support.metrics import named
from tests.support.studies import ROWS, WrittenRuns, finished, page, tiny_study, verdicts

pytestmark = pytest.mark.usefixtures("quick_pictures")


def reported(file: Path) -> Report:
    return report(load_study(file))


def test_a_study_is_reported_in_words_in_tables_and_for_programs(file: Path, written: WrittenRuns) -> None:
    made, text = finished(file), page(file)
    assert json.loads(file.with_name("summary.json").read_text()) == made.summary
    assert all(f"**{sentence}**" in text for sentence in made.verdict)
    assert [sentence.partition(":")[0] for sentence in made.verdict] == ["small", "large"]
    for title in ("## Budget: small", "## Budget: large", "## Learning rates", "## How it was measured"):
        assert title in text
    assert file.with_name("differences.png").exists()
    small = made.summary["budgets"]["small"]
    assert (small["measure"], small["take"], small["round"]) == ("loss", "lora", 2)
    assert small["entries"]["lora"]["learning_rate"] == 0.002
    assert small["entries"]["lora"]["step_seconds"] == pytest.approx(0.1)
    assert [pair[:2] for pair in small["pairs"]] == [["ours", "lora"], ["lora", "ours"]]
    assert small["pairs"][0][2] == pytest.approx(-0.1, abs=0.01)
    assert "The base model: loss 4.0000." in text
    assert "on a CPU, at commit ccccccc" in text
    assert "errs by itself" in text, "of two budgets"


def test_before_the_first_look_it_says_what_is_done(file: Path, written: WrittenRuns) -> None:
    assert all("0 of " in sentence for sentence in reported(file).verdict)
    edit(file, ["seeds=[0]"])
    made = finished(file)
    assert made.tables == {}
    assert "--seeds 3` goes on" in made.verdict[0]


def test_rates_are_listed_with_the_chosen_one_and_those_that_diverged(file: Path, written: WrittenRuns) -> None:
    usual = written.loss
    written.loss = lambda config: None if config.training["learning_rate"] > 0.003 else usual(config)
    edit(file, ["entries.full.learning_rate=8e-5"])
    finished(file)
    lora, full = (
        next(line for line in page(file).splitlines() if line.startswith(f"| {n} | ")) for n in ("lora", "full")
    )
    rates = page(file).partition("## Learning rates")[2].splitlines()
    assert any(line.startswith("| lora | 2e-3 |") and "diverged" in line and "2.100" in line for line in rates)
    assert any(line.startswith("| full | 8e-5 |") for line in rates)
    assert lora != full


def test_a_final_run_that_diverged_is_worse_than_any(file: Path, written: WrittenRuns) -> None:
    usual = written.loss
    is_bad = lambda config: config.method == "smoa" and config.training["seed"] == 1  # noqa: E731
    written.loss = lambda config: None if is_bad(config) else usual(config)
    small = finished(file).summary["budgets"]["small"]
    assert small["take"] == "lora"
    assert small["entries"]["ours"]["worst"]["loss"] is None
    assert "diverged" in page(file)


@pytest.mark.parametrize("metric", [None, "choice", "contains"])
def test_a_run_that_diverged_is_worse_than_any_by_shares_too(
    metric: str | None, file: Path, written: WrittenRuns
) -> None:
    """Not one without a right answer."""
    usual = written.loss
    written.kind = "messages" if metric == "contains" else "choices"
    edit(file, [f"shared.data.metric={metric or 'null'}"])
    is_bad = lambda config: config.method == "smoa" and config.training["seed"] == 1  # noqa: E731
    written.loss = lambda config: None if is_bad(config) else usual(config)
    finished(file)
    families = {metric.title: family for metric, family in verdicts(file)["small"].families.items()}
    family = families["contains %" if metric == "contains" else "accuracy %"]
    assert family.diverged("ours")
    assert family.upper("lora", "ours") == -math.inf


def test_the_pairs_of_an_entry_share_the_level_of_a_look(file: Path, written: WrittenRuns) -> None:
    edit(file, ["entries.full.budget=small"])
    finished(file)
    of = verdicts(file)["small"]
    assert {family.level for family in of.families.values()} == {of.level / 2}


def test_choices_are_compared_by_accuracy_too_and_decide_where_the_loss_is_the_same(
    file: Path, tmp_path: Path, written: WrittenRuns
) -> None:
    written.kind = "choices"
    small = finished(file).summary["budgets"]["small"]
    assert (small["measure"], [*small["entries"]["ours"]["values"]]) == ("loss", ["loss", "accuracy %"])
    large = verdicts(file)["large"]
    assert [metric.title for metric in large.families] == ["loss"], "of one that is constant nothing is compared"
    other = tiny_study(tmp_path / "other")
    edit(other, ["shared.data.metric=choice"])
    small = finished(other).summary["budgets"]["small"]
    assert (small["measure"], small["take"]) == ("accuracy %", "ours")


def test_bounds_are_those_of_whole_rounds_and_a_take_stands_whatever_runs_later(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = finished(file).summary["budgets"]["small"]
    monkeypatch.setattr("smoa_lab.study.run_study.verdict", lambda *_: {})
    written.loss = lambda config: 9.0 if config.method == "lora" else written.usual_loss(config)
    work(file)  # the third round too, which no look asked for
    assert len(list(file.parent.glob("lora/lr-2e-3-seed-?"))) == 3
    again = reported(file).summary["budgets"]["small"]
    assert {key: again[key] for key in ("take", "round", "level", "pairs")} == {
        key: first[key] for key in ("take", "round", "level", "pairs")
    }
    edit(file, ["seeds=[0,1,2,3,4]", "rounds=3"])
    assert reported(file).summary["budgets"]["small"]["pairs"] == first["pairs"]


def test_a_changed_tolerance_asks_again_without_another_look(file: Path, written: WrittenRuns) -> None:
    assert finished(file).summary["budgets"]["small"]["take"] == "lora"
    edit(file, ["tolerance=0.001"])
    again = finished(file).summary["budgets"]["small"]
    assert again["take"] == "ours"
    assert again["level"] > 0.01


def test_an_entry_that_fails_is_named_and_the_others_get_their_verdict_at_the_level_of_all(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = verdicts(file)["small"].looks(3)[0][1]

    def run(config: RunConfig) -> dict[str, Any]:
        if config.method == "lora":
            raise RuntimeError("no memory.")
        return written.run(config)

    monkeypatch.setattr(run_study, "run", run)
    made = finished(file)
    assert "lora failed: RuntimeError: no memory; " in made.verdict[-1]
    assert "take ours" in made.verdict[0]
    assert made.summary["budgets"]["small"]["level"] == level


def test_runs_are_paired_by_row_and_copies_of_a_row_count_as_one(file: Path, written: WrittenRuns) -> None:
    once = finished(file).summary["budgets"]["small"]
    for rows in file.parent.rglob("rows.jsonl.gz"):
        lines = gzip.decompress(rows.read_bytes()).splitlines(keepends=True)
        lines += [line.replace(b'"copy": 0', b'"copy": 1') for line in lines]
        rows.write_bytes(gzip.compress(b"".join(reversed(lines) if "lora" in rows.parts else lines)))
        (rows.parent / "metrics.json").touch()  # it is read anew
    again = reported(file).summary["budgets"]["small"]
    for key in ("pairs", "gains"):
        assert json.dumps(again[key]) == json.dumps(once[key])
    assert f"On {2 * ROWS} held-out rows of {ROWS} groups" in page(file)


def test_a_report_names_no_place_of_this_machine(
    tmp_path: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tiny_study(Path("studies/chats"))
    finished(file)
    for name in ("README.md", "summary.json"):
        assert str(tmp_path) not in file.with_name(name).read_text()


# metrics of answers


def test_a_metric_decides_and_another_scores_the_stored_answers_without_a_run(file: Path, written: WrittenRuns) -> None:
    edit(file, ["shared.data.metric=contains"])
    small = finished(file).summary["budgets"]["small"]
    assert (small["measure"], small["take"]) == ("contains %", "ours")
    assert small["pairs"][0][2] == pytest.approx(-0.25)
    assert "right answers (contains)" in page(file)
    ran = len(written.ran)
    edit(file, ["shared.data.metric=exact"])
    again = finished(file).summary["budgets"]["small"]
    assert (again["measure"], again["pairs"][0][2]) == ("exact %", pytest.approx(-0.25))
    assert "right answers (exact)" in page(file)
    assert "(contains)" not in page(file)
    assert len(written.ran) == ran


RIGHT = "def score(answer, row): return {'4': 3.0, 'It is 4': 1.5}.get(answer, 0.0)"
LEVELS = "def score(answer, row): return float(row['level'])"


def test_a_users_metric_decides_and_a_mended_one_scores_the_stored_answers_again(
    file: Path, tmp_path: Path, written: WrittenRuns
) -> None:
    edit(file, ["shared.data.metric=score"])
    with named(tmp_path / "own.py", RIGHT):
        small = finished(file).summary["budgets"]["small"]
        assert (small["measure"], small["pairs"][0][2]) == ("score", pytest.approx(-0.75))
        assert "own.py:score" in page(file)
        assert small["metric"].startswith("own.py:score ")
    ran = len(written.ran)
    for rows in file.parent.rglob("metrics.json"):
        rows.touch()
    with named(tmp_path / "own.py", LEVELS):
        mended = reported(file).summary["budgets"]["small"]
        assert mended["pairs"][0][2] == pytest.approx(0.0)
        assert mended["metric"] != small["metric"], "which is another look"
    assert len(written.ran) == ran


def test_a_function_that_fails_on_an_answer_names_it_and_the_run_is_kept(
    file: Path, tmp_path: Path, written: WrittenRuns
) -> None:
    edit(file, ["shared.data.metric=score"])
    with (
        named(tmp_path / "own.py", "def score(answer, row): return 1 / 0"),
        pytest.raises(DataError, match=r"rows\.jsonl"),
    ):
        finished(file)
    with named(tmp_path / "own.py", RIGHT):
        for rows in file.parent.rglob("metrics.json"):
            rows.touch()
        assert finished(file).summary["budgets"]["small"]["measure"] == "score"
    assert len(written.ran) == len(set(written.ran))


def test_rows_that_were_stored_with_a_score_and_no_answer_keep_it(file: Path, written: WrittenRuns) -> None:
    edit(file, ["shared.data.metric=contains"])
    made = finished(file).summary["budgets"]["small"]
    for name, run in read_finished(load_study(file)).items():
        kept = [
            {key: value for key, value in row.items() if not key.startswith(("answer", "reference"))}
            for row in run.rows.values()
        ]
        rows = file.parent / name / "rows.jsonl.gz"
        rows.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in kept).encode()))
        (rows.parent / "metrics.json").touch()
    assert reported(file).summary["budgets"]["small"]["pairs"] == made["pairs"]


def test_by_a_metric_the_adapter_that_answers_best_is_kept(file: Path, written: WrittenRuns) -> None:
    edit(file, ["shared.data.metric=exact"])
    finished(file)
    kept = [path.parent.name for path in file.parent.glob("lora/*/adapter")]
    runs = [run for name, run in read_finished(load_study(file)).items() if name.endswith(("seed-0", "seed-1"))]
    lora = [run for run in runs if "lora" in run.folder.path.parts]
    assert kept == [min(lora, key=lambda run: run.lost).folder.path.name]


def test_where_no_answer_is_right_nothing_was_gained_whatever_the_loss(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(file, ["shared.data.metric=exact"])
    usual = written._row
    monkeypatch.setattr(written, "_row", lambda *args: usual(*args) | {"answer_after": "no"})
    made = finished(file)
    assert "gained nothing" in made.verdict[0]
    assert made.summary["budgets"]["small"]["take"] is None
