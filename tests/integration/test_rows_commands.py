"""The files of examples/data: read, trained, and their adapters scored, merged and converted."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from smoa_lab.data.files import read_rows
from tests.support.lab import write_rows
from tests.support.own_rows import rows_base, rows_values
from tests.support.processes import ROOT

pytestmark = pytest.mark.usefixtures("quick_pictures")

EXAMPLES = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_base(tmp_path_factory.mktemp("base"))


def invoke(*arguments: object) -> Any:
    """The JSON of a command that must succeed."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["messages.jsonl", "preference.jsonl"])
def test_an_example_is_trained_scored_merged_and_converted(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each way to train."""
    rows = [row for _, row in read_rows(EXAMPLES / name) if isinstance(row, dict)]
    file = write_rows(tmp_path / name, [rows[0] | {"part": "test"}, *rows[1:]])
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    training = {"learning_rate": 0.02}
    trainer = "dpo" if name == "preference.jsonl" else "sft"
    values = rows_values(tmp_path, file, base, training=training, trainer=trainer)
    config.write_text(yaml.safe_dump(values))

    metrics = invoke("train", config)
    before, after = (metrics["evaluation"][stage]["loss"] for stage in ("before", "after"))
    assert metrics["data"]["parts"] == {"train": 2, "test": 1}
    assert after < before
    assert (run / "samples.md").is_file()
    assert invoke("eval", run)["scores"]["loss"] == pytest.approx(after, abs=1e-6)
    invoke("merge", run, tmp_path / "merged")
    merged = invoke("eval", config, f"model.name={tmp_path / 'merged'}")
    assert merged["scores"]["loss"] == pytest.approx(after, abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "merged")("Open?", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]

    loss = invoke("convert", run, tmp_path / "lora", "--rank", "32")["loss"]
    assert loss["rows"] == 1
    assert (loss["base"], loss["adapter"]) == (pytest.approx(before, abs=1e-6), pytest.approx(after, abs=1e-6))
    assert loss["lora"] == pytest.approx(after, abs=1e-3)
