"""Our own evidence in studies/: every stored study is found, reported as it was run, and shown by the documents."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import headroom
import numpy as np
import pytest
import results_page
import stored

from smoa.errors import DataError
from smoa_lab.study.comparison import load_study
from smoa_lab.study.report import EVERY_RUN
from smoa_lab.study.results import as_json
from smoa_lab.study.statistics import outcomes
from smoa_lab.study.study import Study
from smoa_lab.study.trials import PACK, Trial, TrialStore, Untouched, own_files, pack
from tests.support import studies

ROOT = Path(__file__).parents[2]
SHOWN = 18
"""Studies with stored runs; there may be more, and none goes away."""
BUILT = {"work", "__pycache__", "index.html", "charts.js"}
"""Parts of paths that are never committed."""


def test_the_documents_show_as_many_studies_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    names = [folder.name for folder in stored.folders()]
    assert len(names) >= SHOWN
    assert [name for name in names if f"../studies/{name}/" not in text] == [], "run python studies/results_page.py"
    monkeypatch.setattr(stored, "report_of", lambda folder: SimpleNamespace(page=lambda charts: ""))  # below
    files: dict[str, Any] = {}
    hooks = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))
    site = SimpleNamespace(
        append=lambda file: files.update({file.src_uri: file}), documentation_pages=list, get_file_from_path=files.get
    )
    hooks["File"].generated = lambda config, uri, **content: SimpleNamespace(src_uri=uri, **content)
    hooks["on_files"](site, None)
    for name in names:
        assert {f"studies/{name}/{file}" for file in ("README.md", "page.html", "summary.json", PACK)} <= files.keys()


@pytest.mark.parametrize("folder", stored.folders(), ids=lambda folder: folder.name)
def test_a_stored_study_is_packed_whole_and_its_page_leads_to_its_runs(folder: Path) -> None:
    assert not own_files(folder), "run smoa compare --report-only --pack on this study"
    report = stored.report_of(folder)
    html = report.page("../charts.js")
    assert not re.search(r"""<link[^>]+href=["']?https?:|\bsrc(?:set)?=["']?https?:|@import""", html)
    shown = re.findall(r'<span id="([^"]+)">', html)
    assert sorted(shown) == TrialStore(folder).names("" if EVERY_RUN in report.sections else "final/")
    assert set(re.findall(r'"#((?:final|tuning)/[^"]+)"', html)) <= set(shown)
    for row in report.summary if EVERY_RUN in report.sections else ():
        assert len([name for name in shown if name.startswith(f"final/{row['entry']}/")]) >= len(row["seeds"])


@pytest.mark.parametrize("folder", stored.folders(), ids=lambda folder: folder.name)
def test_a_stored_study_was_run_with_the_settings_of_its_file(folder: Path) -> None:
    """`smoa compare` reruns nothing of it and can report it."""
    comparison = stored.comparison(folder.name)
    finals = {entry: comparison.stored_finals(entry) for entry in comparison.study.entries}
    searches = {entry: comparison.stored_search(entry) for entry in comparison.study.entries}
    assert any(finals.values())
    assert any(searches.values()) or comparison.study.kind == "sequence"
    comparison.stored(Untouched())


FILES = sorted(file for file in stored.STUDIES.glob("*/*.yaml") if file.stem != "partition-headlines")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_ready_studies_parse(file: Path) -> None:
    # Without use_cpu a study for a GPU is refused where there is none, as it should be.
    study = load_study(file, ["shared.training.use_cpu=true"])
    assert study.reference(next(iter(study.entries))) in study.entries
    assert study.folder == Path("studies", file.stem)


def test_the_documents_and_studies_take_at_most_10_megabytes() -> None:
    files = [path for part in ("docs", "studies") for path in (ROOT / part).rglob("*") if path.is_file()]
    committed = [path for path in files if not BUILT & set(path.parts) and not path.match("studies/*/*.svg")]
    assert sum(path.stat().st_size for path in committed) <= 10_000_000


FINAL: dict[str, Any] = {
    "config": {
        "model": {"name": "all-minilm-l6-v2", "dtype": "float32"},
        "data": {"tasks": ["headlines"], "train_examples": 1920},
        "training": {"per_device_train_batch_size": 32},
    },
    "steps": 60,
    "scores": {"all": {"questions": 2000, "gold_loss": 3.25, "accuracy": 0.5}},
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of documents with stored results, beside one of studies."""
    docs = tmp_path / "docs"
    rows = [studies.row("lora"), studies.row("ours", loss=2.0, loss_difference=None)]
    folder = tmp_path / "studies" / "headlines"
    for row in rows:
        for seed in row.seeds:
            file = TrialStore(folder).file(Trial("final", row.entry, row.learning_rate, seed).name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(FINAL))
    (folder / "summary.json").write_text(json.dumps(as_json(rows)))
    (folder / "differences.png").touch()
    (docs / "lab-results").mkdir(parents=True)
    scores = {"questions": 40, "gold_loss": 2.5, "gold_loss_stderr": 0.25, "accuracy": 0.375, "majority": None}
    for method, loss in (("smoa", 2.0), ("lora", 2.25)):
        metrics = {
            "config": {
                "method": method,
                "model": {"dtype": "float32"},
                "data": {"tasks": ["arc_easy"]},
                "training": {"learning_rate": 0.01, "per_device_train_batch_size": 16},
            },
            "parameters": {"trainable": 158_976},
            "training": {"steps": 60},
            "evaluation": {"before": {"arc_easy": scores}, "after": {"arc_easy": {**scores, "gold_loss": loss}}},
        }
        (docs / "lab-results" / f"demo-{method}.json").write_text(json.dumps(metrics))
    (docs / "inspections").mkdir()
    layers = [
        {"parameters": 10, "relative_update": 0.1, "rank": rank, "effective_rank": 2, "coverage": 0.5}
        for rank in (4, 6)
    ]
    (docs / "inspections" / "demo.json").write_text(json.dumps({"runs/demo-smoa": layers}))
    return docs


def page(docs: Path) -> str:
    results_page.main(docs, docs.parent / "studies")
    return (docs / "results.md").read_text(encoding="utf-8")


def test_a_study_is_shown_with_its_setting_its_tables_and_the_way_to_its_files(docs: Path) -> None:
    text = page(docs)
    assert "Budget all, reference ours: by loss 0 better, 0 same, 1 worse." in text
    assert (
        "Model: all-minilm-l6-v2, float32. Tasks: headlines; 1920 training examples, 60 steps of 32, 2000 test" in text
    )
    assert "| 2.5000 ± 0.1000 | 50.0 ± 10.0 | +0.5000 [+0.2500, +0.7500] | worse |" in text
    assert "[summary as JSON](../studies/headlines/summary.json)" in text
    assert "](../studies/headlines/differences.png)" in text
    pack(docs.parent / "studies" / "headlines")
    link = f", [every run as a line of JSON](../studies/headlines/{PACK})"
    assert page(docs).count(link) == 1
    assert page(docs).replace(link, "") == text


def test_runs_on_the_same_tasks_stand_in_one_table_with_the_untouched_model(docs: Path) -> None:
    text = page(docs)
    assert [line for line in text.splitlines() if line.startswith("| arc_easy |")] == [
        "| arc_easy | untouched | 40 | 2.500 ± 0.250 | 0.375 |",
        "| arc_easy | lora | 40 | 2.250 ± 0.250 | 0.375 |",
        "| arc_easy | smoa | 40 | 2.000 ± 0.250 | 0.375 |",
    ]
    assert "smoa, 158,976 parameters, float32, 60 steps of 16, learning rate 0.01, seed 42" in text
    assert "](lab-results/demo-smoa.json)" in text
    assert "| demo-smoa | 20 | 0.100 | 5 | 2 | 0.500 |" in text  # means over the layers of an adapter


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    assert "No result is stored yet" in page(tmp_path / "docs")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return studies.tiny_study(tmp_path / "study")


CONFIG = {"data": {"tasks": ["reuters"]}, "model": {"name": "encoder"}, "adapter": {"r": 1}}


def of_answers(right: list[int]) -> dict[str, Any]:
    zeros, ones = [0.0] * len(right), [1] * len(right)
    return {"questions": {"task": ["reuters"] * len(right), "nll": zeros, "tokens": ones, "right": right}}


def test_the_error_of_one_seed_is_that_of_paired_questions() -> None:
    after, before = [1, 1, 1, 0], [0, 1, 0, 0]
    gained = headroom.gain(outcomes([of_answers(after)]), outcomes([of_answers(before)]))
    assert gained.mean == 0.5
    assert gained.stderr == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)


def test_seeds_that_differ_add_to_the_error() -> None:
    after = outcomes([of_answers([1, 1, 1, 0]), of_answers([0, 1, 0, 0])])
    gained = headroom.gain(after, outcomes([of_answers([0, 1, 0, 0])]))
    assert gained.mean == 0.25
    of_seeds = np.std([0.5, 0.0], ddof=1) / 2**0.5
    assert gained.stderr == pytest.approx(np.hypot(np.std([0.5, 0, 0.5, 0], ddof=1) / 2, of_seeds))


@pytest.mark.parametrize(("stderr", "clear"), [(0.1, True), (0.11, False), (0.0, True)])
def test_three_standard_errors_are_clear(stderr: float, clear: bool) -> None:
    assert headroom.Gain(0.3 + 1e-9, stderr).is_clear is clear


def finish_headroom(study: Study, entry: str, seed: int, right: list[int]) -> None:
    config = {**CONFIG, "training": {"learning_rate": 0.01, "seed": seed}}
    studies.finish(study, Trial("final", entry, 0.01, seed), 1.0, **of_answers(right), config=config)


def summarize(study: Study, **seeds: list[int]) -> None:
    rows = [{"entry": name, "learning_rate": 0.01, "seeds": gained} for name, gained in seeds.items()]
    (study.folder / "summary.json").write_text(json.dumps(rows))


def test_headroom_of_a_study_is_one_line(study: Study) -> None:
    (study.folder).mkdir()
    (study.folder / "untouched.json").write_text(
        '{"questions": ' + str(of_answers([0] * 40)["questions"]).replace("'", '"') + "}"
    )
    for seed in (0, 1):
        finish_headroom(study, "lora", seed, [1] * 20 + [0] * 20)
        finish_headroom(study, "full", seed, [1] * 36 + [0] * 4)
    finish_headroom(study, "full", 2, [0] * 40)  # which lora lacks
    assert not headroom.is_of_headroom(study.folder)
    summarize(study, lora=[0, 1], full=[0, 1, 2])
    assert headroom.is_of_headroom(study.folder)
    line = headroom.line(study.folder)
    assert dict(zip(headroom.HEADER, line, strict=True)) == {
        "task": "reuters",
        "model": "encoder",
        "seeds": "2",
        "untouched %": "0.0",
        "LoRA's r": "1",
        "LoRA %": "50.0",
        "full %": "90.0",
        "better of both − untouched": "+90.0 ± 4.8",
        "moves": "yes",
        "full − LoRA": "+40.0 ± 7.8",
        "standard errors": "5.1",
        "headroom": "yes",
    }


def test_a_study_without_full_fine_tuning_has_no_headroom(study: Study) -> None:
    finish_headroom(study, "lora", 0, [1] * 40)
    summarize(study, lora=[0])
    with pytest.raises(DataError, match="headroom needs the untouched model and final runs of lora and full"):
        headroom.line(study.folder)
