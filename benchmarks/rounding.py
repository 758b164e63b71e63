"""What 16 bits leave of a small update: W + ΔW rounded to nearest (one product), with a dither, and ΔW apart.

    python benchmarks/rounding.py rounding_kept
    python benchmarks/rounding.py rounding_training

A dither compares the 16 bits that rounding cuts with a fixed noise of the entry's place instead of a half, so that on
average nothing is lost. The library rounds to nearest; the dither is here to be compared with it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _common import run
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig
from smoa.kernels import one_product
from smoa.kernels.one_product import Effective

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
WAYS = ("nearest", "dither", "apart")


class Dithered(Effective):
    """W + ΔW of bfloat16, rounded with a noise of the place of each entry."""

    def _piece(self, rows: slice, columns: slice) -> Tensor:
        wide = self.weight[rows, columns].float()
        made = torch.addcmul(wide, wide, (self.B[rows].float() @ self.A[:, columns].float()))
        (m, n), (top, left) = self.weight.shape, (rows.start or 0, columns.start or 0)
        noise = (torch.arange(m + n, dtype=torch.int64) * 40503 % (1 << 16)).int()
        places = torch.arange(top, top + made.shape[0])[:, None] + torch.arange(left, left + made.shape[1])
        made.view(torch.int32).add_(noise[places]).bitwise_and_(-65536)
        return made.to(self.weight.dtype)


@contextmanager
def way(name: str) -> Iterator[None]:
    """Compute adapted layers by one of `WAYS` while the context is open."""
    before = one_product.MIN_TOKENS, one_product.Effective
    one_product.MIN_TOKENS = 1 << 60 if name == "apart" else 0
    one_product.Effective = Dithered if name == "dither" else Effective  # type: ignore[misc]
    try:
        yield
    finally:
        one_product.MIN_TOKENS, one_product.Effective = before  # type: ignore[misc]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def rounding_kept(device: torch.device, size: int = 1024, tokens: int = 512, draws: int = 6) -> dict[str, Any]:
    """Error ÷ rms(Δy), and the share of Δy that is kept, by Δy/y: mean and standard deviation of the draws."""
    results = []
    for weights in ("uniform", "normal"):
        for share in SIZES:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*WAYS, "lora")}
            for draw in range(draws):
                torch.manual_seed(draw)
                base = nn.Linear(size, size, bias=False)
                if weights == "normal":
                    nn.init.normal_(base.weight, std=0.02)
                base = base.bfloat16().requires_grad_(False)
                x = torch.randn(tokens, size).bfloat16()
                config = SmoaConfig(r=32, num_blocks=4, alpha=32, target_modules=["linear"], init_weights=False)
                model = get_peft_model(nn.ModuleDict({"linear": base}), config)
                layer: Any = model.base_model.model["linear"]
                exact = x.double() @ base.weight.double().T
                with torch.no_grad():
                    first = x.double() @ layer.delta("default").double().T
                    layer.smoa_B["default"].weight.mul_(share * rms(exact) / rms(first))
                    change = x.double() @ layer.delta("default").double().T
                    lora = torch.randn(size, 8) @ torch.randn(8, size)
                    outputs = {}
                    for name in WAYS:
                        with way(name):
                            outputs[name] = layer(x), change
                    lora_change = x.double() @ lora.double().T
                    lora *= share * rms(exact) / rms(lora_change)
                    outputs["lora"] = base(x) + (x.float() @ lora.T).bfloat16(), x.double() @ lora.double().T
                    for name, (y, own) in outputs.items():
                        error, added = y.double() - exact - own, y.double() - base(x).double()
                        found[name].append((rms(error) / rms(own), float((added * own).sum() / own.square().sum())))
            row: dict[str, Any] = {"weights": weights, "share": share}
            for name, pairs in found.items():
                errors, kept = zip(*pairs, strict=True)
                row[name] = {
                    "error": statistics.mean(errors),
                    "kept": statistics.mean(kept),
                    "kept_sd": statistics.stdev(kept),
                }
            results.append(row)
            shown = {name: [round(row[name][key], 3) for key in ("error", "kept")] for name in found}
            print(weights, share, shown, flush=True)
    return {"results": results}


def pretrained(seed: int, hidden: int = 256) -> LlamaForCausalLM:
    """A small Llama that was trained to repeat half of a sequence, so that its weights have structure."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=3, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(250):
        batch = torch.randint(3, 300, (32, 16))
        batch[:, 8:] = batch[:, :8]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.bfloat16().requires_grad_(False)


def fine_tuned(model: Any, steps: int, rate: float, seed: int) -> float:
    """The loss of 192 pairs after so many steps on them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(3, 300, (192, 6), generator=generator)
    labels = pairs.clone()
    labels[:, :3] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    for _ in range(steps):
        rows = torch.randint(0, 192, (48,), generator=generator)
        optimizer.zero_grad()
        model(input_ids=pairs[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(model(input_ids=pairs, labels=labels).loss)


def reinforced(model: Any, steps: int, rate: float, seed: int, prompts: int = 8, group: int = 8) -> float:
    """The mean reward of the last quarter of so many steps of GRPO, whose reward is the share of tokens below 100."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    rewards = []
    for _ in range(steps):
        given = torch.randint(3, 300, (prompts, 4), generator=generator).repeat_interleave(group, 0)
        with torch.no_grad():
            text = given
            for _ in range(4):
                chances = model(input_ids=text).logits[:, -1].float().softmax(-1)
                text = torch.cat([text, torch.multinomial(chances, 1, generator=generator)], 1)
        reward = (text[:, 4:] < 100).float().mean(1)
        by_group = reward.view(prompts, group)
        advantage = ((by_group - by_group.mean(1, keepdim=True)) / (by_group.std(1, keepdim=True) + 1e-4)).flatten()
        logits = model(input_ids=text[:, :-1]).logits[:, 3:].float().log_softmax(-1)
        chosen = logits.gather(-1, text[:, 4:, None]).squeeze(-1)
        optimizer.zero_grad()
        (-(chosen.mean(1) * advantage).mean()).backward()
        optimizer.step()
        rewards.append(float(reward.mean()))
    return statistics.mean(rewards[-steps // 4 :])


def rounding_training(
    device: torch.device, steps: int = 200, seeds: int = 3, rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
) -> dict[str, Any]:
    """Loss of a fine-tune and reward of GRPO after 200 steps in bfloat16, at a tenth of the best of some rates."""
    tasks: dict[str, tuple[Callable[..., float], int]] = {"fine-tune": (fine_tuned, -1), "grpo": (reinforced, 1)}
    bases = {seed: pretrained(seed) for seed in range(seeds)}

    def adapted(seed: int, method: str) -> Any:
        torch.manual_seed(seed)
        chosen: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        smoa = SmoaConfig(r=32, num_blocks=4, alpha=64, partition="contiguous", **chosen)
        config = LoraConfig(r=8, lora_alpha=16, **chosen) if method == "lora" else smoa
        return get_peft_model(copy.deepcopy(bases[seed]), config).train()

    results = {}
    for task, (train, sign) in tasks.items():
        with way("nearest"):
            searched = {rate: train(adapted(0, "smoa"), steps, rate, 0) for rate in rates}
        best = max(searched, key=lambda rate: sign * searched[rate])
        found = {}
        for name in (*WAYS, "lora"):
            with way(name if name in WAYS else "apart"):
                found[name] = [train(adapted(seed, name), steps, best / 10, seed) for seed in range(seeds)]
            print(task, best, name, [round(value, 4) for value in found[name]], flush=True)
        results[task] = {"searched": {str(rate): value for rate, value in searched.items()}, "best": best, **found}
    return {"results": results}


if __name__ == "__main__":
    run(__doc__, rounding_kept=rounding_kept, rounding_training=rounding_training)
