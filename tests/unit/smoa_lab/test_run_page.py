"""The page of a run, whole and unfinished."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from smoa import SmoaConfig
from smoa.errors import ConfigError
from smoa_lab.run_page import report_run
from tests.support.runs import stored_metrics, stored_run

ALL = ["Learned and forgotten", "Held-out scores", "Loss", "Answers before and after", "Config", "Load it"]


def reported(run: Path) -> str:
    """The page's text, without its script."""
    assert report_run(run) == run / "report.html"
    return (run / "report.html").read_text(encoding="utf-8").partition("<script>")[0]


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page.partition("<script>")[0])


def test_a_finished_run_is_shown_whole(tmp_path: Path) -> None:
    page = reported(stored_run(tmp_path / "run"))
    assert headings(page) == ALL[:-1]  # the adapter was moved
    assert "is not finished" not in page
    for told in (
        "smoa, 448 of 10,000 parameters trained, 20 steps in 7 s on a CPU. smoa 0.2.0.",
        "The loss changed by -1.125 ± 0.250 (standard error, paired by row).",
        "learned: accuracy 50.0 → 62.5 %   forgot: +0.250 ± 0.020 nats per token of general text",
        "<dt>Prompt</dt><dd>2 &lt; 3?</dd><dt>Reference</dt><dd>yes</dd><dt>Before</dt><dd>(nothing)</dd>",
        "<td>after</td><td>40</td><td>80</td><td>2.125</td><td>0.625 ± 0.080</td><td>0.250</td>",
        "model:\n  name: org/base\n",
    ):
        assert told in page
    assert page.count("<figure data-chart>") == 1


@pytest.mark.parametrize(
    ("config", "code"), [(SmoaConfig(r=4, num_blocks=2), "import smoa"), (LoraConfig(r=2), "AutoPeftModelForCausalLM")]
)
def test_how_to_load_the_adapter_is_told(config: Any, code: str, tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    config.base_model_name_or_path, config.task_type = "org/base", "CAUSAL_LM"
    config.save_pretrained(run / "adapter")
    page = reported(run)
    assert headings(page) == ALL
    assert code in page
    assert f'from_pretrained("{run / "adapter"}")' in unescape(page)


def test_of_an_unfinished_run_the_last_checkpoint_and_the_config_are_shown(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "checkpoint-10").mkdir()
    log = {"log_history": stored_metrics()["history"][:2]}
    (run / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(log))
    page = reported(run)
    assert "<p>The run is not finished." in page
    assert headings(page) == ["Loss", "Config"]


def test_what_was_not_measured_or_is_no_number_is_left_out(tmp_path: Path) -> None:
    metrics = stored_metrics()
    metrics["evaluation"]["after"]["loss"] = metrics["history"][2]["loss"] = None
    metrics["forgetting"] |= {"after": None, "change": None, "stderr": None}
    page = reported(stored_run(tmp_path / "run", **metrics))
    assert headings(page) == ALL[:-1]
    assert "Training diverged: a loss is no number." in page
    nothing = stored_run(tmp_path / "nothing", evaluation={}, gain=None, forgetting=None, samples=[], history=[])
    assert headings(reported(nothing)) == ["Config"]


def test_a_method_that_this_version_does_not_know_is_shown_and_the_page_goes_where_it_is_wanted(tmp_path: Path) -> None:
    run, page = stored_run(tmp_path / "run"), tmp_path / "pages" / "mine.html"
    (run / "config.yaml").write_text("method: smoa-next\n")
    assert report_run(run, page) == page
    assert headings(page.read_text()) == ALL[:-1]
    assert not (run / "report.html").exists()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run: contains no config\.yaml"):
        report_run(tmp_path)
