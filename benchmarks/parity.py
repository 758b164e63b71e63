"""Trainer against rollout in bfloat16: how far the log-probabilities of the two differ.

    python benchmarks/parity.py parity [--steps 50]

A small real model is trained by GRPO. Then it samples, and each sampled token's log-probability is compared with the
trainer's, which scores whole sequences unmerged: of the merged model for whole sequences, and of `generate`, which
decodes with a cache. What the base model differs by from itself, by the cache alone, stands beside it.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from _common import run
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import smoa
from smoa import SmoaConfig
from smoa_lab.base_models import prepare_packaged_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTIONS = ("Name a colour.", "What is the capital of France?", "Why is the sky blue?", "Count to five.")


def adapted(method: str, model: Any) -> Any:
    """`model` with a method at the parameters of LoRA r = 8."""
    chosen: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: LoraConfig(r=8, lora_alpha=16, **chosen),
        "hira": lambda: HiraConfig(r=8, **chosen),
        "smoa": lambda: SmoaConfig(r=32, num_blocks=4, alpha=64, partition="contiguous", **chosen),
    }
    return model if method == "base" else get_peft_model(model, configs[method]())


def scored(model: Any, sequences: Tensor, given: int) -> Tensor:
    """Log-probabilities of the tokens after the first `given`, of whole sequences."""
    logits = model(input_ids=sequences).logits[:, given - 1 : -1].float().log_softmax(-1)
    return logits.gather(-1, sequences[:, given:, None]).squeeze(-1)


def sampled(model: Any, prompts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sampled sequences, and the log-probabilities of their new tokens as `generate` computed them."""
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
    found = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=None,
        **settings,
    )
    logits = torch.stack(found.logits, 1).float().log_softmax(-1)
    new = found.sequences[:, prompts.shape[1] :]
    return found.sequences, logits.gather(-1, new[..., None]).squeeze(-1)


def trained(model: Any, prompts: Tensor, steps: int, rate: float, group: int, tokens: int) -> None:
    """So many steps of GRPO, whose reward is the share of different tokens in an answer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        given = prompts[step % len(prompts)].expand(group, -1)
        sequences, _ = sampled(model, given, tokens)
        reward = torch.tensor([len(set(row.tolist())) / tokens for row in sequences[:, given.shape[1] :]])
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        optimizer.zero_grad()
        (-(scored(model, sequences, given.shape[1]).mean(1) * advantage).mean()).backward()
        optimizer.step()


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    return {"mean": float((a - b).abs().mean()), "largest": float((a - b).abs().max())}


def parity(
    device: torch.device,
    methods: tuple[str, ...] = ("base", "lora", "hira", "smoa"),
    steps: int = 50,
    rate: float = 1e-3,
    rows: int = 40,
    tokens: int = 56,
    group: int = 8,
) -> dict[str, Any]:
    """SmolLM2-135M-Instruct after so many steps of GRPO with each method, 2,240 sampled tokens."""
    folder = prepare_packaged_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = [tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False) for text in texts]
    shortest = min(map(len, ids))
    prompts = torch.tensor([row[-shortest:] for row in ids])
    results = {}
    for method in methods:
        torch.manual_seed(0)
        model = adapted(method, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
        if method != "base":
            trained(model.train(), prompts, steps, rate, group, 12)
        model.eval()
        found: dict[str, Any] = {}
        given = prompts.repeat(rows // len(prompts), 1)
        with torch.no_grad():
            if method == "smoa":
                smoa.keep_in_generate(model, "merged")
            sequences, own = sampled(model, given, tokens)
            trainer = scored(model, sequences, shortest)
            found["generate"] = difference(own, trainer)
            if method != "base":
                with model.disable_adapter():
                    found["moved by the adapter"] = difference(scored(model, sequences, shortest), trainer)
                model = model.merge_and_unload()
                found["merged, whole sequences"] = difference(scored(model, sequences, shortest), trainer)
                found["merged, generate"] = difference(sampled_again(model, sequences, shortest), trainer)
        results[method] = found
        print(method, found, flush=True)
        del model
        gc.collect()
    return {"tokens": rows * tokens, "results": results}


def sampled_again(model: Any, sequences: Tensor, given: int) -> Tensor:
    """Log-probabilities of given sequences, token by token with a cache, as an engine decodes them."""
    output = model(input_ids=sequences[:, :given], use_cache=True)
    found = [output.logits[:, -1]]
    for place in range(given, sequences.shape[1] - 1):
        step = sequences[:, place : place + 1]
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits[:, -1])
    logits = torch.stack(found, 1).float().log_softmax(-1)
    return logits.gather(-1, sequences[:, given:, None]).squeeze(-1)


if __name__ == "__main__":
    run(__doc__, parity=parity)
