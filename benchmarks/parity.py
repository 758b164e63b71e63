"""Trainer against rollout in bfloat16: how far the log-probabilities of the two differ.

    python benchmarks/parity.py parity
    python benchmarks/parity.py parity --vllm    # in the environment of `make serve-test`

A small real model, SmolLM2 135M as `smoa` unpacks it, is trained by GRPO. Then it samples, and each sampled token's
log-probability is compared with the trainer's, which scores whole sequences unmerged: of the merged model for whole
sequences, of `generate`, which decodes with a cache, and of vLLM, with merged weights and with the adapter. What the
base model differs by from itself stands beside it.
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from _common import run
from _vllm import BASE, ENVIRONMENT, TARGETS
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import smoa
from smoa import SmoaConfig

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
    vllm: bool = False,
) -> dict[str, Any]:
    """SmolLM2-135M-Instruct after so many steps of GRPO with each method, 2,240 sampled tokens."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = [tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False) for text in texts]
    shortest = min(map(len, ids))
    prompts = torch.tensor([row[-shortest:] for row in ids])
    results = {}
    for method in methods:
        torch.manual_seed(0)
        model = adapted(method, AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16))
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
            if vllm:
                for way, by_engine in rollouts(method, model, given.tolist(), tokens).items():
                    drawn, own = map(torch.tensor, by_engine)
                    found[way] = difference(own, scored(model, drawn, shortest))
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


def rollouts(method: str, model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """What vLLM samples of the base, of merged weights and, where it can, with the adapter, in a process for each."""
    with tempfile.TemporaryDirectory() as room:
        ways: dict[str, tuple[str, str | None]] = {"vllm": (str(BASE), None)}
        if method != "base":
            ways = {"vllm, merged": (f"{room}/merged", None), "vllm, adapter": (str(BASE), f"{room}/adapter")}
            model.save_pretrained(f"{room}/adapter")
            copy.deepcopy(model).merge_and_unload().save_pretrained(f"{room}/merged")
        if method == "hira":
            del ways["vllm, adapter"]
        found = {}
        for way, (weights, adapter) in ways.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as own:
                found[way] = own.submit(by_vllm, weights, adapter, prompts, tokens).result()
        return found


def by_vllm(
    weights: str, adapter: str | None, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Sequences that vLLM samples, and the log-probabilities of their new tokens."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    engine = LLM(
        weights, dtype="bfloat16", enforce_eager=True, max_model_len=256, seed=0, skip_tokenizer_init=True, **settings
    )
    sampling = SamplingParams(
        temperature=1, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    request = LoRARequest("own", 1, adapter) if adapter else None
    given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [each.outputs[0] for each in engine.generate(given, sampling, lora_request=request, use_tqdm=False)]
    sequences = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, outputs, strict=True)]
    return sequences, [
        [place[token].logprob for place, token in zip(one.logprobs, one.token_ids, strict=True)] for one in outputs
    ]


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
