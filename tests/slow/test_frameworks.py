"""Training frameworks run SMoA as their manuals say: each in an environment that pip makes here and the test deletes.

The files of examples/frameworks are run, with a tiny model and ten lines of data in the place of theirs.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from tests.slow.processes import ROOT, build_environment, packages
from tests.support.lab import byte_tokenizer, tiny_base

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples" / "frameworks"
OURS = {"PYTHONPATH": str(ROOT / "src")}
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1", "USE_HF": "1"}
MINUTES = 20  # for one command; each takes less than one on an idle machine
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
QUESTIONS = [(f"What is {i} plus one?", str(i + 1)) for i in range(10)]


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with a base model whose tokenizer knows conversations, and data in the frameworks' formats."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny_base(tmp_path / "base"))
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in QUESTIONS]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"sums": {"file_name": "alpaca.json"}}', encoding="utf-8")
    return tmp_path


@contextmanager
def environment(room: Path, *wanted: str) -> Iterator[Path]:
    """The Python of an environment with these packages; it is deleted at the end, because it takes up to 3 GB."""
    folder = room / "environment"
    try:
        yield build_environment(folder, *wanted, with_pip=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(python: Path, room: Path, *words: str, **variables: str) -> str:
    """What a command of the environment prints, run in the room as from an activated shell."""
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(python.parent / words[0]), *words[1:]],
        cwd=room,
        env={**os.environ, **OURS, **QUIET, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60 * MINUTES,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def recipe(room: Path, example: str, **changed: Any) -> str:
    """The file of an example with some keys changed and None ones removed, as a file in the room."""
    keys = {**yaml.safe_load((EXAMPLES / example).read_text(encoding="utf-8")), **changed}
    file = room / f"{changed['output_dir']}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}), encoding="utf-8")
    return file.name


@torch.no_grad()
def check(base: Path, adapter: Path, merged: Path | None) -> None:
    """The adapter is the example's, has learned something, and equals the merged model."""
    inputs = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(inputs).logits
    config: Any = PeftConfig.from_pretrained(str(adapter))
    config.other_base = merged is None  # its 4 bits move W by 30 %: 32 columns are half of a quantization block
    adapted = PeftModel.from_pretrained(plain, str(adapter), config=config)
    assert (config.peft_type, config.r, config.num_blocks, config.alpha) == ("SMOA", 32, 4, 64)
    after = adapted(inputs).logits
    assert (after - before).abs().max() > 0.01
    if merged is not None:
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        torch.testing.assert_close(model(inputs).logits, after, rtol=1e-3, atol=1e-3)


AXOLOTL = [
    pytest.param(["axolotl==0.19.0"], id="0.19"),
    pytest.param([*["--ignore-requires-python"][: sys.version_info < (3, 12)], "axolotl==0.21.0"], id="0.21"),
]
"""0.21 asks for Python 3.12. Its code runs under 3.11 too."""


@pytest.mark.parametrize("wanted", AXOLOTL)
def test_axolotl_trains_merges_and_quantizes(room: Path, wanted: list[str]) -> None:
    changed = {
        "base_model": str(room / "base"),
        "datasets": [{"path": str(room / "alpaca.json"), "ds_type": "json", "type": "alpaca"}],
        "special_tokens": {"pad_token": "<pad>"},
        "val_set_size": 0,
        "max_steps": 10,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "bf16": False,
    }
    with environment(room, *wanted) as python:
        file = recipe(room, "axolotl.yaml", **changed, output_dir="out")
        run(python, room, "axolotl", "train", file, "--launcher", "python")
        run(python, room, "axolotl", "merge-lora", file)
        check(room / "base", room / "out", room / "out" / "merged")
        file = recipe(room, "axolotl.yaml", **changed | {"max_steps": 2}, output_dir="out4", load_in_4bit=True)
        log = run(python, room, "axolotl", "train", file, "--launcher", "python")
        assert "converting PEFT model w/ prepare_model_for_kbit_training" in log
        check(room / "base", room / "out4", None)


def test_swift_trains_merges_generates_and_quantizes(room: Path) -> None:
    changed = {
        "model": str(room / "base"),
        "model_type": "llama",
        "template": "default",
        "external_plugins": str(EXAMPLES / "swift_plugin.py"),
        "dataset": str(room / "alpaca.json"),
        "split_dataset_ratio": 0,
        "torch_dtype": "float32",
        "report_to": "none",
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "add_version": False,
    }
    with environment(room, "ms-swift==4.6.0") as python:
        run(python, room, "swift", "sft", recipe(room, "swift.yaml", **changed, output_dir="out"))
        trained = room / "out" / "checkpoint-10"
        words = ["--adapters", str(trained), "--merge_lora", "true", "--output_dir", "merged"]
        run(python, room, "swift", "export", *words)
        check(room / "base", trained, room / "merged")
        words = ["--val_dataset", str(room / "alpaca.json"), "--max_new_tokens", "4", "--result_path", "answers.jsonl"]
        run(python, room, "swift", "infer", "--adapters", str(trained), *words)
        assert len((room / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == len(QUESTIONS)
        bits = {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_compute_dtype": "float32", "max_steps": 2}
        log = run(python, room, "swift", "sft", recipe(room, "swift.yaml", **changed | bits, output_dir="out4"))
        assert "(base_layer): Linear4bit" in log
        check(room / "base", room / "out4" / "checkpoint-2", None)


def test_llamafactory_trains_merges_and_quantizes(room: Path) -> None:
    changed = {
        "model_name_or_path": str(room / "base"),
        "dataset_dir": str(room),
        "dataset": "sums",
        "template": "default",
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    export = {"adapter_name_or_path": "out", "export_dir": "merged", "infer_dtype": "float32", "template": "default"}
    (room / "export.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(room / "base"), **export}), "utf-8")
    train = ["python", "-m", "smoa.integrations.llamafactory"]
    with environment(room, "llamafactory==0.9.5") as python:
        without_torchaudio(python)
        log = run(python, room, *train, recipe(room, "llamafactory.yaml", **changed, output_dir="out"))
        assert "Gradient checkpointing enabled" in log
        run(python, room, "python", "-m", "smoa", "exec", "llamafactory-cli", "export", "export.yaml")
        check(room / "base", room / "out", room / "merged")
        bits = {"quantization_bit": 4, "max_steps": 2}
        log = run(python, room, *train, recipe(room, "llamafactory.yaml", **changed | bits, output_dir="out4"))
        assert "Quantizing model to 4 bit" in log
        check(room / "base", room / "out4", None)


def without_torchaudio(python: Path) -> None:
    """Put an empty module in the place of torchaudio, which LLaMA-Factory imports and pip's build of it needs CUDA."""
    own = packages(python.parents[1])
    shutil.rmtree(own / "torchaudio", ignore_errors=True)
    (own / "torchaudio.py").write_text('"""Empty: text needs no sound."""\n', encoding="utf-8")


def test_peft_adapts_a_model_after_unsloth_has_changed_it(room: Path) -> None:
    worker = ROOT / "tests" / "integration" / "workers" / "unsloth_patches.py"
    with environment(room, "unsloth==2026.10.9") as python:
        run(python, room, "python", str(worker), str(room / "base"), str(room / "out"), UNSLOTH_ALLOW_CPU="1")
