"""The page of a run, whole, unfinished, damaged and of an older version."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from smoa import SmoaConfig
from smoa.errors import ConfigError
from smoa_lab.report import read_run, report_run
from tests.support.runs import stored_metrics, stored_run

ALL = ["Learned and forgotten", "Held-out scores", "Loss", "Answers before and after", "Config", "Load it"]


def reported(run: Path) -> tuple[str, list[str]]:
    """The page's text, and what is missing."""
    file, missing = report_run(run)
    assert file == run / "report.html"
    assert (run / "charts.js").is_file()
    return file.read_text(encoding="utf-8"), missing


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_finished_run_is_shown_whole(tmp_path: Path) -> None:
    page, missing = reported(stored_run(tmp_path / "run"))
    assert headings(page) == ALL
    assert missing == []
    assert 'class="missing"' not in page
    for told in (
        "smoa, 448 of 10,000 parameters trained, 20 steps in 7 s on a CPU. smoa 0.2.0.",
        "Forgotten: +0.250 ± 0.020 nats per token of general text (A story, 2,048 tokens).",
        "<dt>Prompt</dt><dd>2 &lt; 3?</dd><dt>Reference</dt><dd>yes</dd><dt>Before</dt><dd>(nothing)</dd>",
        "<td>piqa</td><td>after</td><td>40</td><td>2.125</td><td>0.625 ± 0.080</td><td>0.250</td>",
        "model:\n  name: org/base\n",
        "adapter/ is not here",
    ):
        assert told in page
    assert page.count("<figure data-chart>") == 3


def test_a_resumed_run_does_not_claim_all_its_steps_for_the_time_since_then(tmp_path: Path) -> None:
    page, _ = reported(stored_run(tmp_path / "run", training={"steps": 20, "seconds": 7.25, "resumed": True}))
    assert "trained, 20 steps, the last ones in 7 s on a CPU." in page


@pytest.mark.parametrize(
    ("config", "code"), [(SmoaConfig(r=4, num_blocks=2), "import smoa"), (LoraConfig(r=2), "AutoPeftModelForCausalLM")]
)
def test_how_to_load_the_adapter_is_told(config: Any, code: str, tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    config.base_model_name_or_path, config.task_type = "org/base", "CAUSAL_LM"
    config.save_pretrained(run / "adapter")
    page, missing = reported(run)
    assert missing == []
    assert code in page
    assert f'from_pretrained("{run / "adapter"}")' in unescape(page)


def test_a_run_of_all_weights_is_loaded_as_a_model(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    (run / "config.yaml").write_text("method: full\n")
    (run / "adapter").mkdir()
    assert "AutoModelForCausalLM.from_pretrained" in reported(run)[0]


@pytest.mark.parametrize("content", ['{"config": {', "[1]"])
def test_damaged_metrics_leave_the_config(content: str, tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    (run / "metrics.json").write_text(content)
    page, (missing,) = reported(run)
    assert missing.startswith("metrics.json is damaged: ")
    assert headings(page) == ["Config"]


def test_of_an_unfinished_run_the_last_checkpoint_and_the_config_are_shown(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "checkpoint-10").mkdir()
    log = {"log_history": stored_metrics()["history"][:2]}
    (run / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(log))
    page, missing = reported(run)
    assert missing == [
        "The run is not finished: metrics.json is missing. Run the same smoa train again to go on with it."
    ]
    assert headings(page) == ["Loss", "Config"]
    assert page.count('class="missing"') == 1


def test_metrics_of_an_older_version_are_shown_without_what_it_did_not_measure(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    old = {key: value for key, value in stored_metrics().items() if key not in ("forgetting", "samples")}
    (run / "metrics.json").write_text(json.dumps(old))
    page, missing = reported(run)
    assert missing == [
        "metrics.json lacks, or has damaged, what it should have about: Learned and forgotten, "
        "Answers before and after."
    ]
    assert headings(page) == [
        title for title in ALL if title not in ("Learned and forgotten", "Answers before and after")
    ]


@pytest.mark.parametrize(
    ("key", "value", "title"),
    [
        ("evaluation", {"before": 3, "after": "much"}, "Held-out scores"),
        ("history", [{"loss": 1}], "Loss"),
        ("samples", [{"question": None}], "Answers before and after"),
        ("forgetting", {"before": 1}, "Learned and forgotten"),
    ],
)
def test_one_damaged_part_hides_no_other(key: str, value: Any, title: str, tmp_path: Path) -> None:
    page, missing = reported(stored_run(tmp_path / "run", **{key: value}))
    assert len(missing) == 1
    assert title in missing[0]
    assert title not in headings(page)
    assert "Config" in headings(page)


def test_what_was_not_measured_or_is_no_number_is_not_called_missing_or_damaged(tmp_path: Path) -> None:
    metrics = stored_metrics()
    metrics["evaluation"]["after"]["all"]["gold_loss"] = metrics["history"][2]["loss"] = None
    metrics["forgetting"] |= {"after": None, "change": None, "stderr": None}
    page, missing = reported(stored_run(tmp_path / "run", **metrics))
    assert (headings(page), missing) == (ALL, [])
    assert "the loss on general text is no number. Training diverged." in page
    nothing = stored_run(tmp_path / "nothing", evaluation={}, forgetting=None, samples=[], history=[])
    page, missing = reported(nothing)
    assert (headings(page), missing) == (["Config", "Load it"], [])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "config.yaml is missing"),
        (b"method: [smoa", "config.yaml is .* damaged: .*config.yaml, line 1: "),
        (b"smoa", "config.yaml is .* damaged: .* must contain blocks of keys"),
        (b"\xff\xfe", "config.yaml is .* damaged: 'utf-8' codec can't decode"),
    ],
)
def test_a_missing_or_damaged_config_is_taken_from_the_metrics(
    content: bytes | None, told: str, tmp_path: Path
) -> None:
    run = stored_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_bytes(content)
    page, (missing,) = reported(run)
    assert re.match(rf"{told}.* What is shown of it is from metrics\.json\.", missing)
    assert headings(page) == ALL
    assert "method: smoa" in page


@pytest.mark.parametrize("content", ["{", None])
def test_a_damaged_adapter_is_named_and_no_other_part(content: str | None, tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    (run / "adapter").mkdir()
    if content is not None:
        (run / "adapter" / "adapter_config.json").write_text(content)
    page, (missing,) = reported(run)
    assert missing.startswith("adapter/ is damaged: ")
    assert headings(page) == ALL[:-1]


def test_a_method_that_this_version_does_not_know_is_shown_and_the_page_goes_where_it_is_wanted(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    (run / "config.yaml").write_text("method: smoa-next\n")
    file, missing = report_run(run, tmp_path / "pages" / "mine.html")
    assert (file, missing) == (tmp_path / "pages" / "mine.html", [])
    assert headings(file.read_text()) == ALL
    assert not (run / "report.html").exists()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run: .* neither metrics\.json nor config\.yaml"):
        read_run(tmp_path)
