"""The stored studies: what the documents and the site show of them is what their JSON says."""

import gzip
import json
import re
import runpy
import shutil
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import altair as alt
import pytest
import results_page
from again import replay, unpacked
from html_page import Cell, Figure, SortedTable, page
from stored import PACK, Run, compared, final_name, folders, runs_of, store, summary_of
from study_page import study_page

from smoa_lab.study.finished import chosen, read_finished
from smoa_lab.study.report import report
from smoa_lab.study.study import load_study
from smoa_lab.study.verdict import verdict
from tests.support.studies import StudyLife

ROOT = Path(__file__).parents[2]
SHOWN = 27
"""Studies with stored runs; there may be more, and none goes away."""
of_each_study = pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)


def test_the_documents_show_as_many_studies_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    names = [folder.name for folder in folders()]
    assert len(names) >= SHOWN
    assert [name for name in names if f"../studies/{name}/" not in text] == [], "run python studies/results_page.py"
    files: dict[str, Any] = {}
    site = SimpleNamespace(
        append=lambda file: files.update({file.src_uri: file}), documentation_pages=list, get_file_from_path=files.get
    )
    monkeypatch.setattr("study_page.study_page", lambda folder: "")  # below
    hooks = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))
    monkeypatch.setattr(
        hooks["File"], "generated", lambda config, uri, **content: SimpleNamespace(src_uri=uri, **content)
    )
    hooks["on_files"](site, None)
    for name in names:
        assert {f"studies/{name}/{file}" for file in ("README.md", "page.html", "summary.json", PACK)} <= files.keys()


@pytest.mark.parametrize("folder", folders()[::9], ids=lambda folder: folder.name)
def test_the_page_of_a_study_leads_to_its_runs(folder: Path) -> None:
    html, runs = study_page(folder), runs_of(folder)
    html = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""<link[^>]+href=["']?https?:|\bsrc(?:set)?=["']?https?:|@import""", html)
    shown = re.findall(r'<span id="([^"]+)">', html)
    of_sequence = isinstance(summary_of(folder), dict)
    assert sorted(shown) == [name for name in runs if not of_sequence or name.startswith("final/")]
    assert set(re.findall(r'"#((?:final|tuning)/[^"]+)"', html)) <= set(shown)


@pytest.mark.parametrize("name", ["</script>", "<!--<script>", "<img src=x onerror=alert(1)>"])
def test_a_chart_is_on_the_page_as_data_with_its_caption_in_words(name: str) -> None:
    data = alt.InlineData(values=[{"x": name}])
    text = Figure(alt.Chart(data).mark_point(fill="white").encode(x="x:N"), name).__html__()
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    chart = json.loads(found, parse_constant=pytest.fail)
    assert name not in text.replace("</script>\n</figure>", "")
    assert chart["description"] == name
    assert chart["mark"]["fill"] == "var(--paper, white)"


def test_text_that_looks_like_html_is_text_wherever_it_stands() -> None:
    name = "<b>x</b>"
    row = [name, Cell(name, value=name), Cell(name, anchor=True), Cell(name, links={name: name})]
    table = SortedTable([name], [row], name)
    text = page(name, [(name, [name, table, {name: name}])], [name]).partition("<script>")[0]
    assert name not in text
    assert text.count("<td>&lt;b&gt;x&lt;/b&gt;</td>") == 1
    assert '<td data-value="&lt;b' in text
    assert '<td><a href="&lt;b' in text
    assert '<td><span id="&lt;b' in text


def test_the_script_is_in_the_page_and_imports_nothing() -> None:
    head, script = page("Empty").split("<script>")
    assert len(script) < 1_000_000
    assert not any(line.startswith(("import ", "export ")) for line in script.splitlines())
    assert script.count("</script>") == 1
    assert "http" not in head


def gold_loss(run: Run) -> float | None:
    loss: float | None = run["scores"]["all"]["gold_loss"]
    return loss


@of_each_study
def test_the_losses_of_a_summary_and_of_its_report_are_those_of_the_runs(folder: Path) -> None:
    summary, runs, text = summary_of(folder), runs_of(folder), (folder / "README.md").read_text(encoding="utf-8")
    if isinstance(summary, dict):
        for row in summary["runs"]:
            name = final_name(row["entry"], row["learning_rate"], row["seed"])
            run = runs[name]
            assert row["second_loss"] == gold_loss(run)
            assert row["first_loss"] == run["first"]["scores"]["all"]["gold_loss"]
            shown = ["–" if row[key] is None else f"{row[key]:.3f}" for key in ("second_loss", "first_loss")]
            assert re.search(rf"^\| {name} \| {shown[0]} \| \S+ \| {shown[1]} \|", text, re.MULTILINE)
        return
    for row in summary:
        losses = [gold_loss(runs[final_name(row["entry"], row["learning_rate"], seed)]) for seed in row["seeds"]]
        if None in losses:
            assert row["loss"] is None
        else:
            mean = fmean(loss for loss in losses if loss is not None)
            assert row["loss"] == pytest.approx(
                mean, abs=1e-4
            )  # the runs' own are of more digits than their questions'
            assert re.search(rf"^\| {row['entry']} \|.+\| {row['loss']:.4f}( ± \S+)? \|", text, re.MULTILINE)


def test_the_documents_and_studies_take_at_most_10_megabytes() -> None:
    files = [path for part in ("docs", "studies") for path in (ROOT / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) <= 10_000_000


def test_the_pages_of_results_are_those_of_the_stored_ones(tmp_path: Path) -> None:
    """Tables of studies and of their headroom, and that of the verdict."""
    shutil.copy(results_page.DOCS / "verdict.md", tmp_path)
    results_page.main(tmp_path)
    for name in ("results.md", "verdict.md"):
        assert (tmp_path / name).read_text() == (results_page.DOCS / name).read_text()


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
