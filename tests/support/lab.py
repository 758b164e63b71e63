"""A lab in miniature: a tiny random model with its tokenizer in a folder, and a handful of questions."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIALS = ["<pad>", "<bos>", "<eos>"]


def byte_tokenizer(
    adds_bos: bool = True, merges: Sequence[tuple[str, str]] = (), adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """One token per byte, and one for each of ``merges``; made here and not downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        added = [("<bos>", 1), ("<eos>", 2)]
        whole = "<bos> $A <eos>" if adds_eos else "<bos> $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=whole, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Both in one folder, as a base model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(vocabulary: int, positions: int) -> LlamaForCausalLM:
    """A Llama of two layers."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": positions, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, **ends))


@cache
def _files(make: Callable[..., Path], *arguments: Any) -> tuple[dict[str, bytes], torch.Tensor]:
    with TemporaryDirectory() as room:
        files = {file.name: file.read_bytes() for file in make(Path(room), *arguments).iterdir()}
        return files, torch.get_rng_state()


def made_once(folder: Path, make: Callable[..., Path], *arguments: Any) -> Path:
    """The folder with the files that `make(folder, *arguments)` writes, which is called once in a process; random
    numbers go on as if it were called each time."""
    folder.mkdir(parents=True, exist_ok=True)
    files, state = _files(make, *arguments)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.set_rng_state(state)
    return folder


def _tiny_base(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    return saved(tiny_llama(len(tokenizer), positions=512), tokenizer, folder)


def tiny_base(folder: Path) -> Path:
    """A Llama of two layers and its tokenizer."""
    return made_once(folder, _tiny_base)


def tokenizer_revisions(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The revisions in which tokenizers are loaded from now on; those of a local folder are all the same."""
    asked: list[str | None] = []
    original = AutoTokenizer.from_pretrained

    def loaded(source: str, *, revision: str | None = None, **options: Any) -> Any:
        asked.append(revision)
        return original(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loaded)
    return asked


def tiny_gpt2(folder: Path, positions: int, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A GPT-2 of two layers, whose positions are learned: beyond them it fails."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=2, n_head=4, **ends)
    return saved(GPT2LMHeadModel(config), tokenizer, folder)


def tiny_run(
    room: Path, monkeypatch: pytest.MonkeyPatch, *, train: int, test: int, training: dict[str, Any], **sections: Any
) -> dict[str, Any]:
    """The config of a run on a tiny model and so many questions, all in `room`; `sections` are laid over it."""
    monkeypatch.setenv("SMOA_CACHE", str(room / "cache"))
    rows = [*questions(train, "train"), *questions(2, "validation"), *questions(test, "test")]
    write_rows(room / "sums.jsonl", rows)
    return {
        "model": {"name": str(tiny_base(room / "base")), "dtype": "float32"},
        "adapter": {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": str(room / "sums.jsonl"), "template": "alpaca", "train_examples": 8, "samples": 2},
        "training": {"output_dir": str(room / "run"), "use_cpu": True, **training},
        **sections,
    }


def steps(number: int, **training: Any) -> dict[str, Any]:
    """The training block of a run of so many steps of two examples."""
    return {"max_steps": number, "per_device_train_batch_size": 2, "logging_steps": 1, **training}


def questions(number: int, part: str) -> list[dict[str, Any]]:
    """Sums in words, which name their part: enough for the machinery, and every one different."""
    return [
        {
            "prompt": f"In {part}, what is {i} plus one?",
            "choices": [str(i), str(i + 1), "none"],
            "label": 1,
            "part": part,
        }
        for i in range(number)
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def files_with(text: object, folder: Path) -> set[str]:
    """The files under `folder` in which `text` occurs, by their paths in it."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix() for file in files if str(text).encode() in file.read_bytes()}
