from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from smoa.experiments.comparison.rows import Row
from smoa.experiments.comparison.statistics import Difference, Interval

SCRIPT = Path(__file__).parents[2] / "docs" / "figures" / "results.py"


def page(docs: Path) -> str:
    subprocess.run([sys.executable, str(SCRIPT), str(docs)], check=True)
    return (docs / "results.md").read_text(encoding="utf-8")


def row(entry: str, loss: float, difference: Difference | None) -> Row:
    return Row(
        entry=entry,
        budget="r1",
        reference="smoa",
        parameters=158_976,
        search=None,
        seeds=[0, 1, 2],
        loss=loss,
        loss_spread=0.01,
        accuracy=0.5,
        accuracy_spread=0.02,
        accuracy_interval=Interval(0.5, 0.4, 0.6),
        elsewhere=None,
        seconds=60.0,
        loss_difference=difference,
        accuracy_difference=difference,
    )


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    study = tmp_path / "studies" / "headlines"
    study.mkdir(parents=True)
    rows = [row("lora", 3.25, Difference(0.0125, 0.001, 0.024, "worse")), row("smoa", 3.2375, None)]
    (study / "summary.json").write_text(json.dumps([asdict(one) for one in rows]))
    (study / "learning_rates.png").touch()
    (tmp_path / "lab-results").mkdir()
    scores = {"questions": 40, "gold_loss": 2.5, "gold_loss_stderr": 0.25, "accuracy": 0.375, "majority": None}
    metrics = {"evaluation": {"before": {"arc_easy": scores}, "after": {"arc_easy": scores}}}
    (tmp_path / "lab-results" / "demo.json").write_text(json.dumps(metrics))
    return tmp_path


def test_a_study_is_told_in_words_with_its_intervals(docs: Path) -> None:
    text = page(docs)
    assert "reference **smoa**; by loss 0 better, 0 same, 1 worse." in text
    assert "| lora | 158,976 | 3 | 3.2500 ± 0.0100 | +0.0125 [+0.0010, +0.0240] | worse | 50.0 ± 2.0 |" in text
    assert text.index("| smoa |") < text.index("| lora |")


def test_every_result_leads_to_its_json_and_pictures(docs: Path) -> None:
    text = page(docs)
    for target in ("studies/headlines/summary.json", "studies/headlines/learning_rates.png", "lab-results/demo.json"):
        assert f"]({target})" in text
        assert (docs / target).is_file()


def test_a_run_is_shown_before_and_after(docs: Path) -> None:
    text = page(docs)
    for stage in ("before", "after"):
        assert f"| arc_easy | {stage} | 40 | 2.500 ± 0.250 | 0.375 | – |" in text


def test_without_results_the_page_says_so(docs: Path) -> None:
    for folder in ("studies", "lab-results"):
        shutil.rmtree(docs / folder)
    assert "No result is stored yet" in page(docs)


def test_every_stored_study_is_on_the_page() -> None:
    stored = SCRIPT.parents[1]
    committed = (stored / "results.md").read_text(encoding="utf-8")
    studies = [path.parent.name for path in stored.glob("studies/*/summary.json")]
    assert [name for name in studies if f"## {name}\n" not in committed] == [], "run python docs/figures/results.py"
