"""What a study's report says of its runs. Nothing is trained. Whole pages are compared with those in approved/, which
`pytest --renew` writes anew."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import run_study
from smoa_lab.study.run_study import work
from tests.support.lab import named
from tests.support.studies import ROWS, StudyLife

pytestmark = pytest.mark.usefixtures("quick_pictures")
RIGHT = "def score(answer, row): return {'4': 3.0, 'It is 4': 1.5}.get(answer, 0.0)"
KINDS: dict[str, dict[str, Any]] = {
    "messages": {},
    "choices": {"kind": "choices"},
    "score": {"changes": ["shared.data.metric=score"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_each_kind_of_study_is_as_approved(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It names no place of this machine. A rate diverges, and one is a vertex."""
    monkeypatch.chdir(tmp_path)
    life = StudyLife(Path("studies") / kind, monkeypatch)
    life.runs.kind = KINDS[kind].get("kind", life.runs.kind)
    usual = life.runs.loss
    life.runs.loss = lambda config: None if config.training["learning_rate"] > 0.015 else usual(config)
    life.edit("entries.full.learning_rate=8e-5", "entries.full.budget=small", *KINDS[kind].get("changes", []))
    with named(Path("own.py"), RIGHT):
        life.add("alone", "hira", "other")
        life.start()
    approved = Path(__file__).parent / "approved" / f"{kind}.md"
    if request.config.getoption("renew"):
        approved.write_text(life.page)
    assert life.page == approved.read_text()
    assert life.file.with_name("differences.png").exists()


def test_a_study_is_reported_for_programs(life: StudyLife) -> None:
    small = life.start().summary["budgets"]["small"]
    assert (small["measure"], small["take"], small["round"]) == ("loss", "lora", 2)
    assert small["entries"]["lora"]["learning_rate"] == 0.002
    assert small["entries"]["lora"]["step_seconds"] == pytest.approx(0.1)
    assert [pair[:2] for pair in small["pairs"]] == [["ours", "lora"], ["lora", "ours"]]
    assert small["pairs"][0][2] == pytest.approx(-0.1, abs=0.01)


def test_before_the_first_look_it_says_what_is_done(life: StudyLife) -> None:
    assert all("0 of " in sentence for sentence in life.replay().verdict)
    life.edit("seeds=[0]")
    made = life.start()
    assert made.tables == {}
    assert "--seeds 3` goes on" in made.verdict[0]


@pytest.mark.parametrize("metric", [None, "choice", "contains"])
def test_a_final_run_that_diverged_is_worse_than_any_by_shares_too(metric: str | None, life: StudyLife) -> None:
    """Not one without a right answer."""

    def loss(config: RunConfig) -> float | None:
        is_bad = config.method == "smoa" and config.training["seed"] == 1
        return None if is_bad else life.runs.usual_loss(config)

    life.runs.kind, life.runs.loss = "messages" if metric == "contains" else "choices", loss
    life.edit(f"shared.data.metric={metric or 'null'}")
    small = life.start().summary["budgets"]["small"]
    assert small["entries"]["ours"]["worst"]["loss"] is None
    assert "diverged" in life.page
    families = {metric.title: family for metric, family in life.verdicts["small"].families.items()}
    family = families["contains %" if metric == "contains" else "accuracy %"]
    assert family.diverged("ours")
    assert family.upper("lora", "ours") == -math.inf
    assert {one.level for one in families.values()} == {small["level"]}, "of one pair"


def test_the_pairs_of_an_entry_share_the_level_of_a_look(life: StudyLife) -> None:
    life.edit("entries.full.budget=small")
    life.start()
    of = life.verdicts["small"]
    assert {family.level for family in of.families.values()} == {of.level / 2}


def test_choices_are_compared_by_accuracy_too_and_decide_where_they_are_the_metric(
    life: StudyLife, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.runs.kind = "choices"
    small = life.start().summary["budgets"]["small"]
    assert (small["measure"], [*small["entries"]["ours"]["values"]]) == ("loss", ["loss", "accuracy %"])
    large = life.verdicts["large"]
    assert [metric.title for metric in large.families] == ["loss"], "of one that is constant nothing is compared"
    other = StudyLife(tmp_path / "other", monkeypatch)
    other.runs.kind = "choices"
    other.edit("shared.data.metric=choice")
    small = other.start().summary["budgets"]["small"]
    assert (small["measure"], small["take"]) == ("accuracy %", "ours")


def test_a_take_stands_whatever_runs_later(life: StudyLife, monkeypatch: pytest.MonkeyPatch) -> None:
    life.start()
    first = life.said()
    monkeypatch.setattr(run_study, "verdict", lambda *_: {})
    life.runs.loss = lambda config: 9.0 if config.method == "lora" else life.runs.usual_loss(config)
    work(life.file)  # the third round too, which no look asked for
    assert len(life.named("lora/lr-2e-3-seed-?")) == 3
    assert life.said() == first
    life.edit("seeds=[0,1,2,3,4]", "rounds=3")
    assert life.said() == first


def test_a_changed_tolerance_asks_again_without_another_look(life: StudyLife) -> None:
    assert life.start().summary["budgets"]["small"]["take"] == "lora"
    life.ask("tolerance=0.001")
    small = life.start().summary["budgets"]["small"]
    assert small["take"] == "ours"
    assert small["level"] > 0.01


def test_an_entry_that_fails_is_named_and_the_others_get_their_verdict_at_the_level_of_all(life: StudyLife) -> None:
    level = life.verdicts["small"].looks(3)[0][1]
    life.fail("lora")
    made = life.start()
    assert "lora failed: RuntimeError: no memory; " in made.verdict[-1]
    assert "take ours" in made.verdict[0]
    assert made.summary["budgets"]["small"]["level"] == level


def test_runs_are_paired_by_row_and_copies_of_a_row_count_as_one(life: StudyLife) -> None:
    life.start()
    once = life.said()
    for rows in life.file.parent.rglob("rows.jsonl.gz"):
        lines = gzip.decompress(rows.read_bytes()).splitlines(keepends=True)
        lines += [line.replace(b'"copy": 0', b'"copy": 1') for line in lines]
        rows.write_bytes(gzip.compress(b"".join(reversed(lines) if "lora" in rows.parts else lines)))
    life.look_again()
    assert json.dumps(life.said()) == json.dumps(once)
    assert f"On {2 * ROWS} held-out rows of {ROWS} groups" in life.page


# metrics of answers


def test_a_metric_decides_and_another_scores_the_stored_answers_without_a_run(life: StudyLife) -> None:
    for metric in ("contains", "exact"):
        life.edit(f"shared.data.metric={metric}")
        small = life.start().summary["budgets"]["small"]
        assert (small["measure"], small["take"]) == (f"{metric} %", "ours")
        assert small["pairs"][0][2] == pytest.approx(-0.25)
        assert f"right answers ({metric})" in life.page
    assert "(contains)" not in life.page
    assert len(life.runs.ran) == len(life.places())
    kept = [name.split("/")[1] for name in life.named("lora/*/adapter")]
    runs = [life.finished[f"lora/lr-2e-3-seed-{seed}"] for seed in (0, 1)]
    assert kept == [min(runs, key=lambda run: run.lost).folder.path.name], "the one that answers best"


def test_a_users_metric_decides_and_a_mended_one_scores_the_stored_answers_again(
    life: StudyLife, tmp_path: Path
) -> None:
    life.edit("shared.data.metric=score")
    with (
        named(tmp_path / "own.py", "def score(answer, row): return 1 / 0"),
        pytest.raises(DataError, match=r"rows\.jsonl"),
    ):
        work(life.file)
    found = []
    for source, difference in ((RIGHT, -0.75), ("def score(answer, row): return float(row['level'])", 0.0)):
        life.look_again()
        with named(tmp_path / "own.py", source):
            found.append(life.start().summary["budgets"]["small"])
            assert (found[-1]["measure"], found[-1]["pairs"][0][2]) == ("score", pytest.approx(difference))
    names = [one["metric"] for one in found]
    assert all(name.startswith("own.py:score ") for name in names)
    assert names[0] != names[1], "which is another look"


def test_rows_that_were_stored_with_a_score_and_no_answer_keep_it(life: StudyLife) -> None:
    life.edit("shared.data.metric=contains")
    life.start()
    before = life.said()
    for run in life.finished.values():
        rows = [
            {key: row[key] for key in row if not key.startswith(("answer", "reference"))} for row in run.rows.values()
        ]
        run.folder.rows.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    life.look_again()
    assert life.said() == before


def test_where_no_answer_is_right_nothing_was_gained_whatever_the_loss(
    life: StudyLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.edit("shared.data.metric=exact")
    usual = life.runs._row
    monkeypatch.setattr(life.runs, "_row", lambda *args: usual(*args) | {"answer_after": "no"})
    made = life.start()
    assert "gained nothing" in made.verdict[0]
    assert made.summary["budgets"]["small"]["take"] is None
