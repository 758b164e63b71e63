"""``--set``, and what a look at data needs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from smoa_lab.study.written import default_study
from tests.support import lab
from tests.support.lab import chats, write_rows


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return lab.tiny_base(tmp_path / "base")


def test_a_method_is_sized_with_the_users_keys(base: Path) -> None:
    words = ("budget", base, "lora:1", "--method", "ia3", "--json")
    own = ("--set", "ia3.feedforward_modules=[down_proj]", "--set", "ia3.target_modules=[k_proj,down_proj]")
    found = invoke(*words, *own)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)[0]["parameters"] == 2 * (16 + 48)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ia3.feedforward_module=[down_proj]", "feedforward_module: unknown key; did you mean"),
        ("ia3.fan_in_fan_out=17.5", "got 17.5"),
        ("ia4.x=1", "there is no method 'ia4'"),
        ("ia3=1", "write METHOD.KEY=VALUE"),
        ("lora.use_rslora=true", "name the method too"),
    ],
)
def test_keys_are_checked_like_a_runs(setting: str, message: str, base: Path) -> None:
    found = invoke("budget", base, "lora:1", "--method", "ia3", "--set", setting)
    assert found.exit_code == 1
    assert message in found.stderr


def test_a_comparison_has_them_in_its_entries(base: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "sums.jsonl", [*lab.questions(40, "train"), *lab.questions(4, "validation")]))
    own = {"lora": {"use_rslora": True}}
    study = default_study(str(base), rows, ["lora", "smoa"], settings=own)
    assert study["entries"]["lora"]["adapter"]["use_rslora"] is True
    words = ("compare", "--model", base, "--data", rows, "--methods", "lora,smoa", "--set", "lora.use_rslora=true")
    other = invoke(*words, "--set", "dora.use_rslora=true")
    assert "--set dora: is not one of --methods lora,smoa" in other.stderr
    with_file = invoke("compare", tmp_path / "study.yaml", "--set", "lora.use_rslora=true")
    assert "with which --methods, --parameters, --sizes and --set go" in with_file.stderr


def test_a_look_at_data_downloads_nothing_unasked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoa_lab.base_models.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a download"))
    rows = write_rows(tmp_path / "chats.jsonl", chats(12))
    found = invoke("data", "check", rows)
    assert found.exit_code == 1
    assert "give --model, a model or a tokenizer's folder: nothing is downloaded unasked" in found.stderr
    lab.byte_tokenizer().save_pretrained(tmp_path / "tokenizer")  # alone
    found = invoke("data", "check", rows, "--model", tmp_path / "tokenizer", "data.template=alpaca")
    assert found.exit_code == 0, found.output
    lab.tiny_base(tmp_path / "cache" / "models" / "smollm2-135m")  # as it is here once it was asked for
    assert invoke("data", "check", rows, "data.template=alpaca").exit_code == 0
