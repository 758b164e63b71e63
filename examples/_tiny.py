"""The model of the examples: a Llama of two layers with random weights, made offline.

Replace `base_model()` with the name of your model. Random weights have learned nothing, so the figures that the
examples print show that a tool works, not how good the result is.
"""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smoa_lab.basics.files import new_folder

torch.set_num_threads(1)  # for a model this small, threads cost more than they save

ADAPTER = {"r": 16, "num_blocks": 2, "alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Kenya", "Nairobi")]
SOUNDS = [("cat", "meow"), ("dog", "woof"), ("cow", "moo"), ("duck", "quack"), ("sheep", "baa")]


def base_model() -> str:
    """The folder of the model and its tokenizer (one token per byte), made at the first call."""
    folder = Path(tempfile.gettempdir(), f"smoa-examples-{getpass.getuser()}", "tiny-llama")
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            tokenizer = _byte_tokenizer()
            torch.manual_seed(0)
            sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
            tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            config = LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.1)
            LlamaForCausalLM(config).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return str(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def load() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(base_model()), AutoTokenizer.from_pretrained(base_model())


def fit(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], steps: int = 60) -> float:
    """Train the active adapter in a plain loop, and return the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = batch(tokenizer, pairs)
    model.train()
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


@torch.no_grad()
def loss_of(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """Mean loss per token of the answers."""
    return model(**batch(tokenizer, pairs)).loss.item()


def batch(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """All rows in one batch of tensors."""
    encoded = rows(tokenizer, pairs)
    return {name: torch.tensor([row[name] for row in encoded]) for name in encoded[0]}


def rows(tokenizer: Any, pairs: list[tuple[str, str]], length: int = 24) -> list[dict[str, list[int]]]:
    """Question and answer as `input_ids`, `attention_mask` and `labels` (the answer's tokens only)."""
    encoded = []
    for question, answer in pairs:
        prompt, target = tokenizer(f"{question}: ").input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
        padding = length - len(prompt) - len(target)
        encoded.append(
            {
                "input_ids": prompt + target + [tokenizer.pad_token_id] * padding,
                "attention_mask": [1] * (length - padding) + [0] * padding,
                "labels": [-100] * len(prompt) + target + [-100] * padding,
            }
        )
    return encoded
