"""Makes the golden files, in a clone of commit 1eaf65e9 with its environment; not run again with newer code.

cd clone && cp ../smoa/tests/support/golden.py tests/support/
PYTHONPATH=. OMP_NUM_THREADS=1 .venv/bin/python ../smoa/tests/golden/make.py ../smoa/tests/golden
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from smoa import SmoaConfig
from smoa_lab.config.run import check_config
from smoa_lab.data import commonsense, small
from smoa_lab.data.encoding import Encoder, Tokens
from smoa_lab.data.formats import recognize, shape
from smoa_lab.data.rows import Row
from smoa_lab.data.tasks import Columns, FileTask, find_task, read_file_split, select
from smoa_lab.training.train_run import train
from tests.support import golden
from tests.support.own_rows import MARKED, PLAIN, tokenizer_with, write_rows

COMMON: dict[str, Any] = {"r": 6, "num_blocks": 3, "alpha": 9, "init_weights": False}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "spectral": ("llama", LLAMA),
    "contiguous": ("llama", LLAMA | {"partition": "contiguous"}),
    "random": ("llama", LLAMA | {"partition": "random"}),
    "without-w": ("llama", LLAMA | {"modulation": "none"}),
    "scale-paper": ("llama", LLAMA | {"scale": "paper"}),
    "scale-block": ("llama", LLAMA | {"scale": "block"}),
    "scale-layer": ("llama", LLAMA | {"scale": "layer"}),
    "rslora": ("llama", LLAMA | {"use_rslora": True}),
    "ragged": ("llama", LLAMA | {"r": 7, "smoa_dropout": 0.1}),
    "patterns": (
        "llama",
        LLAMA | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}, "num_blocks_pattern": {"down_proj": 5}},
    ),
    "head-saved": ("llama", LLAMA | {"modules_to_save": ["lm_head"]}),
    "new-tokens": ("llama", LLAMA | {"trainable_token_indices": [3, 5]}),
    "tied": ("gemma3", LLAMA | {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "narrow": ("gemma3", LLAMA | {"target_modules": ["k_proj", "o_proj"], "r": 20, "num_blocks": 10}),
    "conv1d-bias": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "smoa_only", "task_type": "CAUSAL_LM"}),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts-transposed": (
        "gpt_oss",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "other-layers": ("small", {"target_modules": ["table", "line", "grouped", "head"], "num_blocks": 2}),
}
"""An adapter of each kind that stays: its base, and what differs from ``COMMON``."""
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("llama", LLAMA | {"modulation": "noise"}),
    "block-ranks": ("llama", LLAMA | {"block_ranks": [1, 2, 3]}),
    "shared-experts": ("qwen3_moe", {**KINDS["experts"][1], "expert_partition": "shared"}),
}
"""One of each kind that is read no longer."""
HUB: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is {a} {n}", "passage": "{b} is {a} number {n}.", "answer": True},
    "piqa": {"goal": "Find the {a} {n}", "sol1": "ask the {b}", "sol2": "wait", "label": 1},
    "socialiqa": {
        "context": "{a} met {b} {n}.",
        "question": "Why?",
        "label": "2",
        "answerA": "to sit",
        "answerB": "to run {n}",
        "answerC": "no",
    },
    "hellaswag": {
        "activity_label": "Running {n}",
        "ctx_a": "{a} runs.",
        "ctx_b": "the {b}",
        "label": "3",
        "endings": ["stops. [title]Then", "goes", "[step] sleeps", "is {a}"],
    },
    "winogrande": {"sentence": "{a} saw {b} {n} because _ ran.", "option1": "{a}", "option2": "{b}", "answer": "2"},
    **{
        name: {key: "What is {a} {n}?", "choices": {"text": ["{b}", "{a} {n}"], "label": ["A", "B"]}, "answerKey": "B"}
        for name, key in {
            "arc_easy": "question",
            "arc_challenge": "question",
            "openbookqa": "question_stem",
            "csqa": "question",
        }.items()
    },
    "gsm8k": {"question": "{a} has {n} and {n}. How many?", "answer": "{n}+{n}=<<{n}+{n}>> ok\n#### {n}"},
}
"""Rows as the Hub has them, made up, for each named set."""
RUNS: dict[str, dict[str, Any]] = {
    "chats": {"format": "messages", "method": "smoa", "adapter": {"r": 4, "num_blocks": 2, "alpha": 8}},
    "texts": {
        "format": "text",
        "method": "smoa",
        "adapter": {"r": 8, "num_blocks": 4, "alpha": 16, "partition": "contiguous"},
    },
    "preferences": {"format": "preference", "method": "lora", "adapter": {"r": 2, "lora_alpha": 4}},
    "questions": {"format": "questions", "method": "smoa", "adapter": {"r": 4, "num_blocks": 2, "alpha": 8}},
}
"""Four runs of ten steps in float32."""


def main(out: Path) -> None:
    torch.set_num_threads(1)
    adapters(out)
    with gzip.GzipFile(out / "tokens.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(encoded(), ensure_ascii=False).encode())
    hub = {name: hub_rows(row) for name, row in HUB.items()}
    (out / "hub.json").write_text(json.dumps(hub, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "demo.json").write_text(json.dumps(demo(), indent=1) + "\n")
    (out / "losses.json").write_text(json.dumps(losses(), indent=1) + "\n")


def adapters(out: Path) -> None:
    """Save one of each kind, and what its model says."""
    said = {}
    for group, kinds in {"adapters": KINDS, "refused": REFUSED}.items():
        shutil.rmtree(out / group, ignore_errors=True)
        for name, (base, changes) in kinds.items():
            torch.manual_seed(len(said))
            model = get_peft_model(golden.base(base), SmoaConfig(**COMMON | changes)).eval()
            folder = out / group / name
            model.save_pretrained(folder)
            (folder / "README.md").unlink()
            if group == "adapters":
                said[name] = golden.output(model, base)
    for name in {base for base, _ in KINDS.values()}:
        said[f"base:{name}"] = golden.output(golden.base(name), name)
    save_file(said, out / "outputs.safetensors")
    bases = {name: base for name, (base, _) in {**KINDS, **REFUSED}.items()}
    (out / "bases.json").write_text(json.dumps(bases, indent=1) + "\n")


def plain(*tokens: Tokens) -> list[Any]:
    """Pairs of ids and labels."""
    pairs = [[each.input_ids, each.labels] for each in tokens]
    return pairs[0] if len(pairs) == 1 else pairs


def encoded() -> dict[str, list[Any]]:
    """The tokens of 20 rows of each format, and of each named set."""
    found: dict[str, list[Any]] = {}
    for template, text in {"plain": PLAIN, "marked": MARKED}.items():
        encoder = Encoder(tokenizer_with(text), 1024)
        everything = Encoder(tokenizer_with(text), 1024, assistant_only=False, completion_only=False)
        cut = Encoder(tokenizer_with(text), 48)
        for format in ("messages", "prompt", "preference", "alpaca", "sharegpt", "text"):
            rows = [shape(row, recognize(row)) for row in golden.rows(format)]
            found[f"{format} {template}"] = [plain(encoder.encode(row)) for row in rows]
            found[f"{format} {template} whole"] = [plain(everything.encode(row)) for row in rows]
            found[f"{format} {template} cut"] = [plain(cut.encode(row)) for row in rows]
            if format == "preference":
                found[f"{format} {template} rejected"] = [plain(encoder.encode(row, rejected=True)) for row in rows]
        asked = list(question_rows())
        for style in ("text", "label"):
            for form in ("alpaca", "chat"):
                encoder = Encoder(tokenizer_with(text), 256, form, style)  # type: ignore[arg-type]
                found[f"questions {template} {form} {style}"] = [
                    [plain(encoder.encode(row)), plain(*encoder.choices(row))] for row in asked
                ]
    for name in HUB:
        encoder = Encoder(tokenizer_with(PLAIN), 256)
        found[f"set {name}"] = [plain(encoder.encode(row)) for row in set_rows(name)]
    return found


def question_rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as room:
        file = write_rows(Path(room, "q.jsonl"), golden.rows("questions"))
        columns = Columns(prompt="prompt", choices="choices", label="label", context="context")
        yield from read_file_split("own", FileTask(train=str(file), columns=columns), "train")


def hub_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Twenty rows of a set."""

    def put(value: Any, number: int) -> Any:
        if isinstance(value, str):
            words = {"a": golden.WORDS[number % 9], "b": golden.WORDS[9 + number % 9], "n": number}
            return value.format(**words)
        if isinstance(value, list):
            return [put(each, number) for each in value]
        if isinstance(value, dict):
            return {key: put(each, number) for key, each in value.items()}
        return bool(number % 2) if isinstance(value, bool) else value

    return [put(row, number) for number in range(golden.ROWS)]


def set_rows(name: str) -> list[Row]:
    """The questions that a set's rows become."""
    rows = hub_rows(HUB[name])
    for module in (commonsense, small):
        module.hub_rows = lambda *_: rows  # type: ignore[assignment]
    return small.read_gsm8k("train") if name == "gsm8k" else commonsense.read_hub_split(name, "train")


def demo() -> dict[str, Any]:
    """The demo's questions in order, part by part, as digests of their tokens."""
    sizes = {"train": 1520, "validation": 64, "test": 300}
    chosen = select({"csqa": find_task("csqa")}, sizes, 0.05, 0)
    encoder = Encoder(tokenizer_with(None), 96)
    return {
        part: {
            "rows": len(rows),
            "first": rows[0].prompt,
            "sha256": sha256(
                json.dumps([[plain(encoder.encode(row)), plain(*encoder.choices(row))] for row in rows]).encode()
            ).hexdigest(),
        }
        for part, rows in {"train": chosen.train, "validation": chosen.validation, "test": chosen.test}.items()
    }


def losses() -> dict[str, Any]:
    """Of each run the loss of every step, and the held-out loss before and after."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        os.environ["SMOA_CACHE"] = str(room / "cache")
        base = golden.language_model(room / "base")
        for name, run in RUNS.items():
            format = run["format"]
            rows = golden.rows(format, 64)
            files = {
                part: str(write_rows(room / f"{name}-{part}.jsonl", own))
                for part, own in {"train": rows[:48], "test": rows[48:]}.items()
            }
            data: dict[str, Any] = {**files, "samples": 0}
            more: dict[str, Any] = {}
            if format == "questions":
                columns = {"prompt": "prompt", "choices": "choices", "label": "label", "context": "context"}
                data = {"tasks": ["own"], "files": {"own": {**files, "columns": columns}}, "validation_part": 0.0}
                more = {"task": {"samples": 0}}
            config = check_config(
                {
                    "model": {"name": str(base), "dtype": "float32"},
                    "method": run["method"],
                    "adapter": {**run["adapter"], "target_modules": "all-linear"},
                    "data": data,
                    "forgetting": {"tokens": 512},
                    "training": {
                        "output_dir": str(room / name),
                        "use_cpu": True,
                        "max_steps": 10,
                        "per_device_train_batch_size": 4,
                        "learning_rate": 0.01,
                        "logging_steps": 1,
                        "save_strategy": "no",
                        "seed": 0,
                    },
                    **more,
                }
            )
            metrics = train(config)
            found[name] = {
                "config": {**run, "learning_rate": 0.01, "batch": 4},
                "losses": [entry["loss"] for entry in metrics["history"] if "loss" in entry],
                "evaluation": metrics["evaluation"],
                "forgetting": {key: value for key, value in metrics["forgetting"].items() if key != "text"},
            }
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
