"""What a run trained is what is merged, verified, answered with and scored: options, reference, template and stops; and
no folder runs its code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smoa_lab import base_models
from smoa_lab.base_models import RunModel, load_weights
from smoa_lab.chat import Chat
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.export import convert_run, merge_run, verify
from smoa_lab.inspect import inspect_layers
from smoa_lab.open_run import open_place
from smoa_lab.training.train import run
from tests.support import lab
from tests.support.lab import chats, write_rows

ROPE = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    training = lab.steps(6, learning_rate=0.05)
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=4, training=training, forgetting={"tokens": 0})


def test_all_that_load_a_runs_model_take_it_whole(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options, its chat template, and the end of its turns: none of them is the base's own."""
    base = Path(config["model"]["name"])
    tokenizer = lab.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    config["model"]["options"] = ROPE
    config["data"] = {"train": str(write_rows(tmp_path / "chats.jsonl", chats(20))), "test_examples": 2, "samples": 0}
    config["data"]["template"] = str(tmp_path / "own.jinja")
    checked = check_config(config)
    loaded: list[tuple[Any, str | None]] = []
    options: list[Any] = []
    load, load_alone = RunModel.load, base_models.load_weights

    def noted(self: RunModel) -> Any:
        loaded.append((load(self), str(self.tokenizer.chat_template)))
        return loaded[-1][0]

    def weights(section: ModelSection, *others: Any, **more: Any) -> Any:
        options.append(section.options)
        return load_alone(section, *others, **more)

    monkeypatch.setattr(RunModel, "load", noted)
    for place in ("base_models", "export", "inspect"):
        monkeypatch.setattr(f"smoa_lab.{place}.load_weights", weights)
    run(checked)
    assert open_place(checked.folder / "adapter", str(base)).model.section.options == ROPE
    evaluate_run(open_place(checked.folder))
    Chat(open_place(checked.folder))
    Chat(open_place(checked.folder / "adapter"))
    verify(checked.folder, ["merged"])
    inspect_layers(checked.folder)
    convert_run(checked.folder, tmp_path / "lora", 2)
    merge_run(checked.folder, tmp_path / "merged")
    assert options == [ROPE] * len(options)
    assert len(options) >= len(loaded) + 5  # verify loads two, and each other command one
    merged = load_weights(ModelSection(name=str(tmp_path / "merged")))
    loaded.append((merged, (tmp_path / "merged" / "chat_template.jinja").read_text()))
    for model, template in loaded:
        assert (model.config.rope_parameters["factor"], template) == (4, own)
        assert tokenizer.pad_token_id in model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("chat", ""),
        ("merge", "contains custom code"),
        ("verify", "agrees  merged"),
        ("eval", "majority"),
        ("inspect", "coverage"),
    ],
)
def test_no_code_of_an_adapters_folder_or_its_bases_runs_whatever_a_pipe_says(
    command: str, told: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """Each command does its work all the same, but for a merge, which would copy the adapter's own tokenizer."""
    ran = tmp_path / "ran"

    def add_code(folder: Path, **own: str) -> None:
        (folder / "x.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass X: pass\n")
        code = {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.X", "AutoTokenizer": ["x.X", "x.X"]}
        for file in (folder / "tokenizer_config.json", folder / "config.json"):
            known = json.loads(file.read_text()) if file.exists() else {"model_type": "x"}
            file.write_text(json.dumps({**known, "auto_map": code, **own}))

    checked = check_config(config)
    run(checked)
    base, adapter = Path(checked.model.name), checked.folder / "adapter"
    add_code(base)
    add_code(adapter, tokenizer_class="X")
    place = [str(checked.folder if command == "eval" else adapter), "--base", str(base)]
    place += [str(tmp_path / "merged"), "--no-verify"] if command == "merge" else []
    done = subprocess.run(
        [sys.executable, "-m", "smoa_lab", command, *place],
        input="y\ny\ny\n",
        text=True,
        timeout=300,
        check=False,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert not ran.exists()
    assert done.returncode == (command == "merge"), done.stderr
    assert done.stdout.strip() or command == "merge", done.stderr  # a chat shows its answers alone
    assert told in done.stdout + done.stderr, (done.stdout, done.stderr)
