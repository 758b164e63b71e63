"""The stored studies: what the documents and the site show of them is what their JSON says."""

import gzip
import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from again import replay, unpacked
from stored import PACK, compared, runs_of, store

from smoa_lab.study.finished import chosen, read_finished
from smoa_lab.study.report import report
from smoa_lab.study.study import load_study
from smoa_lab.study.verdict import verdict
from tests.support.studies import StudyLife

ROOT = Path(__file__).parents[2]


def test_a_study_is_stored_with_the_digests_of_a_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = StudyLife(tmp_path / "study", monkeypatch, seeds=[0, 1])
    file, made = life.file, life.start()
    store(file.parent, tmp_path / "stored")
    with gzip.open(tmp_path / "stored" / PACK, "rt") as lines:
        stored = [json.loads(line) for line in lines]
    assert len(stored) == len(list(file.parent.rglob("metrics.json"))) > 10
    assert [("digest" in run["rows"], "rows_of" in run) for run in stored].count((True, False)) == 1
    known = read_finished(load_study(file))
    for name, run in runs_of(tmp_path / "stored").items():
        rows = known[name].rows
        assert list(zip(run["rows"]["digest"], run["rows"]["copy"], strict=True)) == sorted(rows)
        assert run["rows"]["after"] == [rows[key]["after"] for key in sorted(rows)]
        assert "rows_of" not in run
    with unpacked(tmp_path / "stored") as again:
        assert report(again).summary["budgets"] == made.summary["budgets"]


def test_a_study_with_more_seeds_is_replayed_as_it_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {name: {"method": name, "learning_rate": rate} for name, rate in (("smoa", 0.01), ("lora", 0.002))}
    life = StudyLife(tmp_path / "study", monkeypatch, seeds=[0, 1, 2], entries=entries)
    usual = life.runs.loss  # seeds differ too much for two rounds to tell
    life.runs.loss = lambda config: (usual(config) or 0.0) + 0.2 * (-1) ** int(config.training["seed"])
    life.start()
    store(life.file.parent, tmp_path / "stored")
    whole = replay(tmp_path / "stored")
    life.edit("seeds=[0,1,2,3,4]", "rounds=3")
    life.start()
    store(life.file.parent, tmp_path / "extended")
    found = replay(tmp_path / "extended")
    assert sum(found["rounds"].values()) == 60, "orders of three of the five seeds"
    assert set(found["rounds"]) <= {"2", "3"}
    assert set(whole["rounds"]) <= {"2", "3"}
    assert 0 < found["minutes"] <= 1


def test_a_study_with_sizes_is_replayed_by_its_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        f"{method}-r{size}": {"method": method, "learning_rate": rate, "budget": f"r = {size}"}
        for size in (4, 1)
        for method, rate in (("smoa", 0.01), ("lora", 0.002))
    }
    life = StudyLife(tmp_path / "study", monkeypatch, seeds=[0, 1, 2], entries=entries)
    made = life.start()
    store(life.file.parent, tmp_path / "stored")
    with unpacked(tmp_path / "stored") as again:
        assert report(again).summary["budgets"] == made.summary["budgets"]
        assert (again.folder / "sizes.png").is_file()
    found = replay(tmp_path / "stored")
    assert {take.partition(":")[0] for take in found["takes"]} == {"r = 1", "r = 4"}
    assert sum(found["takes"].values()) == 2 * sum(found["rounds"].values())


OF_PACKS = pytest.mark.parametrize(
    "folder", [each for each in compared() if (each / PACK).is_file()], ids=lambda folder: folder.name
)
NOW_TAKES = {"chats-2": "lora", "chain-sum": "dora", "gsm8k": "lora", "recall-1024-r2": "smoa-spectral"}


@OF_PACKS
def test_a_stored_study_chooses_the_rates_that_it_ran_at_and_takes_whom_it_took(folder: Path) -> None:
    known = json.loads((folder / "chosen.json").read_text())
    with unpacked(folder) as study:
        finished = read_finished(study)
        for name in study.entries:
            one = chosen(study, finished, name)
            assert one is not None
            assert (one.learning_rate, one.place) == (known[name]["learning_rate"], known[name]["place"])
        (found,) = verdict(study, finished).values()
        assert found.take == NOW_TAKES.get(folder.name)
        results = json.loads((folder / "results.json").read_text())["budgets"]["all"]
        if results.get("round") == found.round and results["level"] == found.level:
            assert found.family is not None
            for name, other, _, upper in results["pairs"]:
                assert found.family.upper(name, other) == pytest.approx(upper, abs=1e-12)


@OF_PACKS
def test_the_scores_of_a_compared_study_are_those_of_its_stored_rows(folder: Path) -> None:
    results, runs = json.loads((folder / "results.json").read_text(encoding="utf-8")), runs_of(folder)
    for entry in results["entries"]:
        names = rf"{entry['entry']}/.*-seed-({'|'.join(map(str, entry['seeds']))})"
        final = [run["rows"] for name, run in runs.items() if re.fullmatch(names, name)]
        assert len(final) == len(entry["seeds"])
        scores = {"loss": [sum(rows["after"]) / sum(rows["tokens"]) for rows in final]}
        if "scored_after" in final[0]:
            scores[f"{runs['untouched']['config']['data']['metric']} %"] = [
                fmean(rows["scored_after"]) for rows in final
            ]
        for name, (mean, _) in entry["values"].items():
            assert fmean(scores[name]) == pytest.approx(mean)
