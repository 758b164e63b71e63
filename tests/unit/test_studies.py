"""Our own evidence in studies/: every stored study is found, reported as it was run, and shown by the documents."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gallery
import headroom
import numpy as np
import pytest
import results_page
import stored

from smoa.errors import DataError
from smoa_lab.study.comparison import load_study
from smoa_lab.study.report import EVERY_RUN
from smoa_lab.study.results import as_json, rows_of
from smoa_lab.study.sequence_report import sequence_summary
from smoa_lab.study.statistics import outcomes
from smoa_lab.study.study import Study
from smoa_lab.study.trials import PACK, Trial, TrialStore, Untouched, own_files
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
    monkeypatch.setattr(
        hooks["File"], "generated", lambda config, uri, **content: SimpleNamespace(src_uri=uri, **content)
    )
    hooks["on_files"](site, None)
    for name in names:
        assert {f"studies/{name}/{file}" for file in ("README.md", "page.html", "summary.json", PACK)} <= files.keys()


report_of = cache(stored.report_of)


@pytest.mark.parametrize("folder", stored.folders(), ids=lambda folder: folder.name)
def test_a_stored_study_is_packed_whole_and_its_page_leads_to_its_runs(folder: Path) -> None:
    assert not own_files(folder), "run smoa compare --report-only --pack on this study"
    report = report_of(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith(report.readme().rstrip("\n"))
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
    assert any(searches.values()) or comparison.study.kind == "sequence" or not comparison.study.tuning.max_runs
    comparison.stored(Untouched())


@pytest.mark.parametrize(
    "name",
    [
        *("headroom-reuters", "commonsense-float32", "recall-256", "recall-gemma-256"),
        *("retention-replay", "retention-seeds", "retention-smollm2-reversed"),
    ],
)
def test_a_report_that_is_computed_anew_is_the_wanted(name: str) -> None:
    comparison, wanted = stored.comparison(name), json.loads((stored.STUDIES / name / "summary.json").read_text())
    is_sequence = comparison.study.kind == "sequence"
    summary = sequence_summary(comparison) if is_sequence else as_json(rows_of(comparison))
    assert_equal(json.loads(json.dumps(summary)), wanted)


def assert_equal(value: Any, other: Any) -> None:
    """The same values, numbers to 1e-12."""
    if isinstance(value, dict | list):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        assert len(value) == len(other)
        for key in keys:
            assert_equal(value[key], other[key])
    else:
        assert value == (pytest.approx(other, rel=1e-12) if isinstance(other, float) else other)


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


def test_the_gallery_has_every_stored_answer() -> None:
    table = gallery.dialogue()
    assert len(table.rows) == 4
    assert table.markdown(["---"] * 5) in gallery.PAGE.read_text(encoding="utf-8")


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    results_page.main(tmp_path / "docs", tmp_path / "studies")
    assert "No result is stored yet" in (tmp_path / "docs" / "results.md").read_text()


def test_the_page_of_results_is_that_of_the_stored_ones(tmp_path: Path) -> None:
    """Tables of studies and of their headroom; those of the verdict."""
    shutil.copy(results_page.DOCS / "verdict.md", tmp_path)
    results_page.main(tmp_path)
    for name in ("results.md", "verdict.md"):
        assert (tmp_path / name).read_text() == (results_page.DOCS / name).read_text()


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


def test_a_study_without_full_fine_tuning_has_no_headroom(study: Study) -> None:
    finish_headroom(study, "lora", 0, [1] * 40)
    summarize(study, lora=[0])
    with pytest.raises(DataError, match="headroom needs the untouched model and final runs of lora and full"):
        headroom.line(study.folder)
