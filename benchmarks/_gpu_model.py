"""A Llama with random weights, adapted by each method, for benchmarks on a GPU."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from _common import GEMMA_TARGETS, synchronize
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from smoa import SmoaConfig

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
TINY_LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
)


def llama(config: LlamaConfig, device: torch.device, quantized: bool = False) -> nn.Module:
    """A model in bfloat16 with random weights, made on its device; its linear layers in 4 bits if asked."""
    if quantized:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        folder = _checkpoint(config.to_json_string(), device).name
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": device})
        return prepare_model_for_kbit_training(loaded)  # type: ignore[no-any-return]
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


@cache
def _checkpoint(config: str, device: torch.device) -> tempfile.TemporaryDirectory[str]:
    """The model of a config in JSON as a checkpoint, made once and removed at the end of the process."""
    folder = tempfile.TemporaryDirectory()
    llama(LlamaConfig(**json.loads(config)), device).save_pretrained(folder.name)  # type: ignore[operator]
    return folder


def adapted_llama(model: nn.Module, adapter: tuple[str, int, str]) -> nn.Module:
    """The model with a method (name, K, partition) that trains the parameters of LoRA r = 8."""
    method, num_blocks, partition = adapter
    targets = list(GEMMA_TARGETS)
    configs: dict[str, Callable[[], PeftConfig]] = {
        "lora": lambda: LoraConfig(r=8, target_modules=targets, init_lora_weights=False),
        "hira": lambda: HiraConfig(r=8, target_modules=targets, init_weights=False),
        "smoa": lambda: SmoaConfig(
            r=8 * num_blocks, num_blocks=num_blocks, partition=partition, target_modules=targets, init_weights=False
        ),
    }
    return get_peft_model(model, configs[method]())  # type: ignore[arg-type]


def model_step(
    config: LlamaConfig,
    adapter: tuple[str, int, str],
    device: torch.device,
    batch: int,
    length: int,
    compile_it: bool,
    quantized: bool,
) -> tuple[Callable[[], None], int]:
    """A training step with gradient checkpointing and AdamW, and the tokens of its batch."""
    model: Any = adapted_llama(llama(config, device, quantized), adapter)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, config.vocab_size, (batch, length), device=device)
    run = torch.compile(model) if compile_it else model

    def step() -> None:
        run(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, tokens.numel()


def decode(config: LlamaConfig, way: str, device: torch.device, length: int) -> dict[str, Any]:
    """Tokens a second of `generate`, and the bytes held while it ran."""
    model: Any = llama(config, device).eval()
    if way != "base":
        method, _, num_blocks = way.replace("merged", "smoa-8").partition("-")
        model = adapted_llama(model, (method, int(num_blocks or 0), "random")).eval()
    if way == "merged":
        model.merge_adapter()
    prompt: Tensor = torch.randint(0, config.vocab_size, (1, 64), device=device)
    settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=prompt, **settings)
    synchronize(device)
    start = time.perf_counter()
    model.generate(input_ids=prompt, **settings)
    synchronize(device)
    return {"tokens_per_second": length / (time.perf_counter() - start)}
