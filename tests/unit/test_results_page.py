from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from smoa_lab.study.comparison import Comparison, stored_finals, stored_search
from smoa_lab.study.packing import PACK, own_files, pack
from smoa_lab.study.report.results.rows import Row, as_json
from smoa_lab.study.report.results.statistics import Difference
from smoa_lab.study.report.sequence.curves import EXPLANATIONS
from smoa_lab.study.study_file import load_study
from smoa_lab.study.trials import TrialStore
from tests.support.studies import row

FINAL: dict[str, Any] = {
    "config": {
        "model": {"name": "all-minilm-l6-v2", "dtype": "float32"},
        "data": {"tasks": ["headlines"], "train_examples": 1920},
        "training": {"per_device_train_batch_size": 32},
    },
    "steps": 60,
    "scores": {"all": {"questions": 2000}},
}
SCRIPT = Path(__file__).parents[2] / "docs" / "figures" / "results.py"


def page(docs: Path) -> str:
    runpy.run_path(str(SCRIPT))["main"](docs, docs / "benchmarks")
    return (docs / "results.md").read_text(encoding="utf-8")


def smoa_row(entry: str, loss: float, difference: Difference | None) -> Row:
    return row(
        entry,
        budget="r1",
        reference="smoa",
        parameters=158_976,
        seeds=[0, 1, 2],
        loss=loss,
        loss_spread=0.01,
        accuracy_spread=0.02,
        task_accuracy={"arc_easy": 0.5},
        loss_difference=difference,
        accuracy_difference=difference,
    )


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    study = tmp_path / "studies" / "headlines"
    study.mkdir(parents=True)
    rows = [smoa_row("lora", 3.25, Difference(0.0125, 0.001, 0.024, "worse")), smoa_row("smoa", 3.2375, None)]
    (study / "summary.json").write_text(json.dumps(as_json(rows)))
    (study / "learning_rates.png").touch()
    (study / "final" / "lora").mkdir(parents=True)
    (study / "final" / "lora" / "lr-0.01-seed-0.json").write_text(json.dumps(FINAL))
    (tmp_path / "lab-results").mkdir()
    scores = {"questions": 40, "gold_loss": 2.5, "gold_loss_stderr": 0.25, "accuracy": 0.375, "majority": None}
    for method, loss in (("smoa", 2.0), ("lora", 2.25)):
        after = {**scores, "gold_loss": loss}
        metrics = {
            "config": {
                "method": method,
                "model": {"dtype": "float32"},
                "data": {"tasks": ["arc_easy"]},
                "training": {"learning_rate": 0.01, "per_device_train_batch_size": 16},
            },
            "parameters": {"trainable": 158_976},
            "training": {"steps": 60},
            "evaluation": {"before": {"arc_easy": scores}, "after": {"arc_easy": after}},
        }
        (tmp_path / "lab-results" / f"demo-{method}.json").write_text(json.dumps(metrics))
    (tmp_path / "inspections").mkdir()
    layers = [
        {"parameters": 10, "relative_update": 0.1, "rank": rank, "effective_rank": 2, "coverage": 0.5}
        for rank in (4, 6)
    ]
    (tmp_path / "inspections" / "demo.json").write_text(json.dumps({"runs/demo-smoa": layers}))
    return tmp_path


def test_means_over_the_layers_of_an_adapter_are_told(docs: Path) -> None:
    assert "| demo-smoa | 20 | 0.100 | 5 | 2 | 0.500 |" in page(docs)


def test_a_study_is_told_in_words_with_its_intervals(docs: Path) -> None:
    text = page(docs)
    assert "reference **smoa**; by loss 0 better, 0 same, 1 worse." in text
    assert "| lora | 158,976 | 3 | 3.2500 ± 0.0100 | +0.0125 [+0.0010, +0.0240] | worse | 50.0 ± 2.0 |" in text
    assert text.index("| smoa |") < text.index("| lora |")
    setting = "Model: all-minilm-l6-v2, float32. Tasks: headlines; 1920 training examples, 60 steps of 32, 2000 test"
    assert setting in text


def test_an_entry_that_diverged_stands_last(docs: Path) -> None:
    nan = float("nan")
    rows = [smoa_row("lora", float("inf"), Difference(nan, nan, nan, "worse")), smoa_row("smoa", 3.2375, None)]
    (docs / "studies" / "headlines" / "summary.json").write_text(json.dumps(as_json(rows)))
    text = page(docs)
    assert "| lora | 158,976 | 3 | diverged | diverged | worse | 50.0 ± 2.0 | diverged | worse |" in text
    assert text.index("| smoa |") < text.index("| lora |")


def test_what_was_forgotten_is_told_beside_the_untouched_model(docs: Path) -> None:
    folder = docs / "studies" / "headlines"
    rows = json.loads((folder / "summary.json").read_text())
    rows[0]["elsewhere"] = 3.5
    (folder / "summary.json").write_text(json.dumps(rows))
    known = {"scores": {"all": {"gold_loss": 4.0, "accuracy": 0.25, "majority": None}}, "elsewhere": 3.0}
    (folder / "untouched.json").write_text(json.dumps(known))
    text = page(docs)
    assert "| worse | 50.0 ± 2.0 | +1.2 [+0.1, +2.4] | worse | 3.500 |" in text
    assert "The untouched model: loss 4.0000, accuracy 25.0 %; its loss elsewhere is 3.000." in text
    del known["elsewhere"]
    (folder / "untouched.json").write_text(json.dumps(known))
    assert "accuracy 25.0 %.\n" in page(docs)


def test_every_result_leads_to_its_json_and_pictures(docs: Path) -> None:
    text = page(docs)
    for target in (
        "studies/headlines/summary.json",
        "studies/headlines/learning_rates.png",
        "lab-results/demo-smoa.json",
    ):
        assert f"]({target})" in text
        assert (docs / target).is_file()


def test_a_packed_study_is_told_alike_and_leads_to_its_runs(docs: Path) -> None:
    folder = docs / "studies" / "headlines"
    known = {"scores": {"all": {"gold_loss": 4.0, "accuracy": 0.25, "majority": None}}}
    (folder / "untouched.json").write_text(json.dumps(known))
    before = page(docs)
    pack(folder)
    link = f", [every run as a line of JSON](studies/headlines/{PACK})"
    assert page(docs).count(link) == 1
    assert page(docs).replace(link, "") == before


def test_runs_on_the_same_tasks_stand_in_one_table_with_the_untouched_model(docs: Path) -> None:
    text = page(docs)
    lines = [line for line in text.splitlines() if line.startswith("| arc_easy |")]
    assert lines == [
        "| arc_easy | untouched | 40 | 2.500 ± 0.250 | 0.375 |",
        "| arc_easy | lora | 40 | 2.250 ± 0.250 | 0.375 |",
        "| arc_easy | smoa | 40 | 2.000 ± 0.250 | 0.375 |",
    ]


def test_how_a_run_was_trained_is_told_beside_its_json(docs: Path) -> None:
    assert "smoa, 158,976 parameters, float32, 60 steps of 16, learning rate 0.01, seed 42" in page(docs)


def test_without_results_the_page_says_so(docs: Path) -> None:
    for folder in ("studies", "lab-results", "inspections"):
        shutil.rmtree(docs / folder)
    assert "No result is stored yet" in page(docs)


def test_every_stored_study_is_on_the_page() -> None:
    stored = SCRIPT.parents[1]
    committed = (stored / "results.md").read_text(encoding="utf-8")
    studies = [path.parent.name for path in stored.glob("studies/*/summary.json")]
    heads = {name: f"studies/{name}/" if name.startswith("headroom-") else f"## {name}\n" for name in studies}
    assert [name for name, head in heads.items() if head not in committed] == [], "run python docs/figures/results.py"


STORED = sorted((SCRIPT.parents[1] / "studies").iterdir())


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_every_stored_study_is_packed_and_its_page_leads_to_its_runs(folder: Path) -> None:
    assert not own_files(folder), "run smoa compare --report-only --pack on this study"
    hooks = runpy.run_path(str(SCRIPT.parents[1] / "site_hooks.py"))
    html = hooks["interactive"](folder / "summary.json")
    shown = re.findall(r'<span id="([^"]+)">', html)
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    is_sequence = isinstance(found, dict)
    assert sorted(shown) == TrialStore(folder).names("final/" if is_sequence else "")
    assert set(re.findall(r'"#((?:final|tuning)/[^"]+)"', html)) <= set(shown)
    for entry in [] if is_sequence else found:
        runs = [name for name in shown if name.startswith(f"final/{entry['entry']}/")]
        assert len(runs) >= len(entry["seeds"])


OTHERWISE = {
    "headlines-refined": ("headlines", "tuning.refine=true"),
    "commonsense-float32": ("commonsense", "shared.model.dtype=float32"),
}
"""Studies that were run by the file of another one, with these overrides (docs/experiment-log.md)."""


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_every_stored_study_is_reported_under_the_settings_that_it_was_run_with(folder: Path) -> None:
    name, *overrides = OTHERWISE.get(folder.name, (folder.name,))
    file = SCRIPT.parents[2] / "configs" / "studies" / f"{name}.yaml"
    study = load_study(file, [*overrides, f"folder={folder}"])
    finals = {entry: stored_finals(study, entry, lambda rate: True) for entry in study.entries}
    searches = {entry: stored_search(study, entry) for entry in study.entries}
    assert any(finals.values())
    assert any(searches.values()) or study.kind == "sequence"
    Comparison(study).stored_untouched()


BUILT = {"work", "__pycache__", "index.html", "charts.js"}
"""Parts of paths that are never committed."""


def test_the_documents_take_at_most_5_megabytes() -> None:
    files = [path for path in SCRIPT.parents[1].rglob("*") if path.is_file() and not BUILT & set(path.parts)]
    committed = [path for path in files if not path.match("studies/*/*.svg")]  # smoa compare writes them
    assert sum(path.stat().st_size for path in committed) <= 5_000_000


def test_a_sequence_is_told_by_what_was_kept_at_equal_learning(docs: Path) -> None:
    read = {"rate": 0.001, "kept_loss": 3.0, "is_lowest": False}
    equal = {"entry": "lora", "reference": "lora", "level": 1.5, "own": read, "other": read}
    summary = {
        "before": None,
        "equal": [{**equal, "difference": None}],
        "next_rate": [],
        "lower_levels": [],
        "least_gaps": {"lora": 0.0},
        "kept_elsewhere": {"equal": [], "lower_levels": [], "next_rate": []},
        "correlations": {figure: {"forgot": 0.5, "forgot_elsewhere": None} for figure in EXPLANATIONS},
        "runs": [],
    }
    (docs / "studies" / "headlines" / "summary.json").write_text(json.dumps(summary))
    text = page(docs)
    assert "| lora | 1.500 | 0.001 | 3.000 | 0.001 | 3.000 |  | reference |  |  |  | 0.000 |" in text
    assert "| stable rank | 0.50 | – |" in text


def test_a_study_that_a_benchmark_ran_is_told_without_links_and_pictures(docs: Path) -> None:
    (docs / "studies" / "headlines").rename(docs / "benchmarks")
    (docs / "studies").rmdir()
    shutil.copytree(docs / "benchmarks", docs / "benchmarks" / "recall-8")
    text = page(docs)
    assert "## recall-8\n\nThe report and every run: `benchmarks/results/recall-8`." in text
    assert "| lora |" in text
    assert "studies/" not in text
    assert "learning_rates.png" not in text


def test_headroom_is_one_table_of_all_tasks_that_were_tried(docs: Path) -> None:
    (docs / "studies" / "headlines").rename(docs / "studies" / "headroom-headlines")
    folder = docs / "studies" / "headroom-headlines"
    answers = {"task": ["headlines"] * 4, "nll": [1.0] * 4, "tokens": [1] * 4}
    for name, right in (
        ("untouched", [0] * 4),
        ("final/lora/lr-0.01-seed-0", [1, 0, 1, 0]),
        ("final/full/lr-0.001-seed-0", [1] * 4),
    ):
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        config = {**FINAL["config"], "adapter": {"r": 1}}
        file.write_text(json.dumps({**FINAL, "config": config, "questions": {**answers, "right": right}}))
    rates = {"lora": 0.01, "full": 0.001}
    rows = [{"entry": name, "learning_rate": rate, "seeds": [0]} for name, rate in rates.items()]
    (folder / "summary.json").write_text(json.dumps(rows))
    text = page(docs)
    assert "## headroom-headlines" not in text
    assert (
        "| headlines | all-minilm-l6-v2 | 1 | 0.0 | 1 | 50.0 | 100.0 | +100.0 ± 0.0 | yes | +50.0 ± 28.9 | 1.7 | no |"
        in text
    )
