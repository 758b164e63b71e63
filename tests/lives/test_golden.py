"""What commit 1eaf65e9 made: its adapters load and say the same, its rows become the same tokens, its runs learn the
same."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from smoa_lab.config.run import check_config
from smoa_lab.data.chat_templates import set_chat_template
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.formats import recognize, shape
from smoa_lab.training.train import run
from tests.support import lab
from tests.support.lab import MARKED, PLAIN, tokenizer_with, write_rows

SAID = load_file(lab.GOLDEN / "outputs.safetensors")
BASES: dict[str, str] = json.loads((lab.GOLDEN / "bases.json").read_text())
LOSSES: dict[str, Any] = json.loads((lab.GOLDEN / "losses.json").read_text())
FORMATS = ("messages", "prompt", "alpaca", "sharegpt", "text")
ENCODERS: dict[str, dict[str, Any]] = {
    "": {"max_length": 1024},
    " whole": {"max_length": 1024, "assistant_only": False, "completion_only": False},
    " cut": {"max_length": 48},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of any method
@pytest.mark.parametrize("name", sorted(path.name for path in (lab.GOLDEN / "adapters").iterdir()))
def test_a_saved_adapter_loads_and_says_what_it_said(name: str) -> None:
    base = BASES[name]
    torch.testing.assert_close(
        lab.golden_output(lab.golden_base(base), base), SAID[f"base:{base}"], rtol=1e-4, atol=1e-4
    )
    model = PeftModel.from_pretrained(lab.golden_base(base), str(lab.GOLDEN / "adapters" / name)).eval()
    said = lab.golden_output(model, base)
    torch.testing.assert_close(said, SAID[name], rtol=1e-4, atol=1e-4)
    assert (said - SAID[f"base:{base}"]).abs().max() > 0.01


@pytest.mark.parametrize("template", ["plain", "marked"])
@pytest.mark.parametrize("format", FORMATS)
def test_rows_become_the_same_tokens(format: str, template: str) -> None:
    tokenizer = tokenizer_with({"plain": PLAIN, "marked": MARKED}[template])
    rows = [shape(row, recognize(row)) for row in lab.golden_rows(format)]
    expected = lab.golden_tokens()
    for way, settings in ENCODERS.items():
        encoder = Encoder(tokenizer, **settings)
        assert [lab.plain_tokens(encoder.encode(row)) for row in rows] == expected[f"{format} {template}{way}"]


def test_rows_with_choices_become_the_same_tokens_in_alpacas_template() -> None:
    """Under a chat template BOS is what the template says, and an answer ends as its turns do: those tokens differ."""
    tokenizer = tokenizer_with(None)
    set_chat_template(tokenizer, "alpaca")
    encoder = Encoder(tokenizer, 256)
    rows = [shape(row, recognize(row)) for row in lab.golden_rows("questions")]
    tokens = [
        [lab.plain_tokens(encoder.encode(row)), list(map(lab.plain_tokens, encoder.choices(row)))] for row in rows
    ]
    assert tokens == lab.golden_tokens()["questions plain alpaca text"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_learns_as_it_did(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    known = LOSSES[name]
    settings, format = known["config"], known["config"]["format"]
    rows = lab.golden_rows(format, 64)
    parts = {"train": rows[:48], "test": rows[48:]}
    if format == "questions":  # which were shuffled twice
        for _ in range(2):
            random.Random(0).shuffle(parts["train"])
    files = {part: str(write_rows(tmp_path / f"{part}.jsonl", own)) for part, own in parts.items()}
    data: dict[str, Any] = {**files, "samples": 0, "validation_examples": 0}
    if format == "questions":
        data["template"] = "alpaca"
    training = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "max_steps": 10,
        "logging_steps": 1,
        "seed": 0,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
    }
    config = {
        "model": {"name": str(lab.golden_model(tmp_path / "base")), "dtype": "float32"},
        "method": settings["method"],
        "adapter": {**settings["adapter"], "target_modules": "all-linear"},
        "data": data,
        "forgetting": {"tokens": 512},
        "training": training,
    }
    metrics = run(check_config(config))
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert losses == pytest.approx(known["losses"], rel=1e-3)
    for when in ("before", "after"):
        assert metrics["forgetting"][when] == pytest.approx(known["forgetting"][when], rel=1e-3)
        now, then = metrics["evaluation"][when], known["evaluation"][when]["all"]
        assert now["loss"] == pytest.approx(then.get("loss", then.get("gold_loss")), rel=1e-3)
        assert now.get("accuracy") == then.get("accuracy")
