"""Measures what merging an adapter for a sampler, and unmerging it, does to a base model in bfloat16 at every step.

    python benchmarks/weight_sync.py drift lora --threads 1    # also hira and smoa
    python benchmarks/weight_sync.py merge --threads 1

TRL's GRPO and RLOO with vLLM merge, send all weights, and unmerge at every step. Here GRPO trains SmolLM2-135M on
CommonsenseQA with answers of one token, the letter: 32 answers to a question are drawn from the policy, rewarded with
1 if right, and their advantages normalized. After each step the adapter is merged into the bfloat16 base and unmerged
by its own `merge_adapter` and `unmerge_adapter`, and the next step starts from what is left. Since CPUs that only
imitate bfloat16 take 8 to 35 times as long for its products, a step is computed in float32, from a copy of that base;
the factors are float32, as PEFT keeps them. LoRA, HiRA and SMoA adapt all linear layers and have as many parameters.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _common import interleaved, run, step_memory, trainable
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as load_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from smoa import SmoaConfig
from smoa_lab.base_models import load_tokenizer, load_weights
from smoa_lab.config.run import ModelSection
from smoa_lab.data.general_text import STORY
from smoa_lab.data.sources import DEMO_FILE
from smoa_lab.scoring.evaluation import Forgetting

BASE = ModelSection(name="smollm2-135m", dtype="bfloat16")
LETTERS = "ABCDE"
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "hira": lambda: HiraConfig(r=8, target_modules="all-linear"),
    "smoa": lambda: SmoaConfig(r=32, num_blocks=4, alpha=64, target_modules="all-linear"),
}
TIMES_RATE = {"lora": 1, "hira": 10, "smoa": 1}
"""How many times LoRA's learning rate each method gets, as in `smoa compare`."""


class Synced:
    """A base in bfloat16, and its float32 copy that trains. The factors of both are the same tensors."""

    def __init__(self, method: str, device: torch.device) -> None:
        base = load_weights(BASE)
        self.tokenizer = load_tokenizer(BASE)
        self.method = method
        self.trained: Any = get_peft_model(copy.deepcopy(base).float().to(device), CONFIGS[method]())
        self.stored: Any = get_peft_model(base.to(device), CONFIGS[method]())
        load_adapter(self.stored, get_peft_model_state_dict(self.trained))
        for mine, theirs in zip(self.stored.parameters(), self.trained.parameters(), strict=True):
            if mine.requires_grad:
                mine.data = theirs.data
        self.pristine = [weight.clone() for weight in self.weights()]

    def layers(self, model: Any) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def weights(self) -> list[Tensor]:
        """The adapted weights as they are stored."""
        return [layer.get_base_layer().weight.data for layer in self.layers(self.stored)]

    def deltas(self) -> Iterator[Tensor]:
        """ΔW of each layer, in float32."""
        for layer in self.layers(self.trained):
            delta = layer.get_delta_weight("default").detach()
            yield delta * layer.get_base_layer().weight if self.method == "hira" else delta

    def sync(self, is_measured: bool) -> dict[str, float]:
        """Merge and unmerge, and train on from what is left.

        Measured are ‖sent − W − ΔW‖ / ‖ΔW‖, where W is the base that was trained on, and ‖ΔW‖ / ‖W‖.
        """
        before = [weight.clone() for weight in self.weights()] if is_measured else []
        self.stored.merge_adapter()
        lost = moved = size = 0.0
        for base, sent, delta in zip(before, self.weights(), self.deltas(), strict=True) if is_measured else ():
            lost += float((sent.double() - base.double() - delta.double()).square().sum())
            moved += float(delta.double().square().sum())
            size += float(base.double().square().sum())
        self.stored.unmerge_adapter()
        for layer, weight in zip(self.layers(self.trained), self.weights(), strict=True):
            layer.get_base_layer().weight.data.copy_(weight)
        if not is_measured:
            return {}
        return {"lost": math.sqrt(lost / moved), "delta": math.sqrt(moved / size), **self.drift()}

    def drift(self) -> dict[str, float]:
        """The share of the adapted weights that are no longer what they were, and ‖W' − W‖ / ‖W‖."""
        pairs = list(zip(self.weights(), self.pristine, strict=True))
        changed = sum(int((now != then).sum()) for now, then in pairs)
        moved = sum(float((now.double() - then.double()).square().sum()) for now, then in pairs)
        size = sum(float(then.double().square().sum()) for _, then in pairs)
        return {"changed": changed / sum(then.numel() for _, then in pairs), "drift": math.sqrt(moved / size)}


class Questions:
    """Batches of CommonsenseQA, and the policy's loss on them."""

    def __init__(self, tokenizer: Any, batch: int, samples: int) -> None:
        with gzip.open(DEMO_FILE, "rt", encoding="utf-8") as lines:
            rows = [row for row in map(json.loads, lines) if row["part"] == "train"]
        self.rows, self.batch, self.samples, self.tokenizer = rows, batch, samples, tokenizer
        self.letters = [tokenizer.encode(f" {letter}")[-1] for letter in LETTERS]

    def loss(self, model: Any, step: int) -> tuple[Tensor, float]:
        """GRPO's loss where each batch is used once, and the mean reward."""
        rows = [self.rows[(step * self.batch + number) % len(self.rows)] for number in range(self.batch)]
        texts = []
        for row in rows:
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
            texts.append(f"{row['prompt']}\n{choices}\nAnswer:")
        inputs = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        logits = model(**inputs, logits_to_keep=1).logits[:, -1, self.letters]
        policy = torch.distributions.Categorical(logits=logits)
        answers = policy.sample((self.samples,))
        rewards = (answers == torch.tensor([row["label"] for row in rows], device=model.device)).float()
        advantages = (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4)
        return -(advantages * policy.log_prob(answers)).mean(), float(rewards.mean())


def drift(
    device: torch.device,
    method: str,
    steps: int = 500,
    rate: float = 2e-4,
    batch: int = 1,
    samples: int = 32,
    text: int = 4000,
) -> dict[str, Any]:
    """The drift of the base in a run, and what rounding takes of ΔW in the weights that are sent.

    `method` is lora, hira or smoa. `rate` is LoRA's and SMoA's; HiRA's is ten times as high. Perplexity is that of the
    base model, without the adapter, on so many tokens of general text, in float32.
    """
    synced = Synced(method, device)
    questions = Questions(synced.tokenizer, batch, samples)
    general = Forgetting(STORY, text, synced.tokenizer, synced.trained.config)
    factors = [parameter for parameter in synced.trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=rate * TIMES_RATE[method], weight_decay=0.0)

    with synced.trained.disable_adapter():
        general.measure(synced.trained, "before")
    rewards, checks = [], []
    for step in range(1, steps + 1):
        loss, reward = questions.loss(synced.trained, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(reward)
        if found := synced.sync(is_measured=step % (steps // 10) == 0):
            checks.append({"step": step, **found})
            print(method, checks[-1], flush=True)
    with synced.trained.disable_adapter():
        general.measure(synced.trained, "after")
    change = general.metrics or {}
    part = steps // 5
    return {
        "name": f"weight_sync_{method}",
        "seed": 0,
        "trainable": trainable(synced.trained),
        "rate": rate * TIMES_RATE[method],
        "checks": checks,
        "reward": [statistics.mean(rewards[:part]), statistics.mean(rewards[-part:])],
        "perplexity": [math.exp(change["before"]), math.exp(change["after"])],
        "loss_change": {"mean": change["change"], "stderr": change["stderr"], "tokens": change["tokens"]},
    }


def merge(device: torch.device, repeats: int = 9) -> dict[str, Any]:
    """Seconds of a merge with its undo, taken in turn, the bytes held while merged, and the most at once in both."""
    models: dict[str, Any] = {}
    memory: dict[str, dict[str, int]] = {}
    for method, config in CONFIGS.items():
        base = load_weights(BASE)
        models[method] = model = get_peft_model(base.to(device), config())
        for name, parameter in model.named_parameters():
            if "_B" in name:  # zeros until it is trained
                torch.nn.init.normal_(parameter, std=1e-3)
        held, peak = step_memory(model.merge_adapter)
        _, of_undo = step_memory(model.unmerge_adapter)
        memory[method] = {"held": held, "peak": max(peak, held + of_undo)}

    def both(model: Any) -> Callable[[], None]:
        def merge_and_undo() -> None:
            model.merge_adapter()
            model.unmerge_adapter()

        return merge_and_undo

    steps = {method: both(model) for method, model in models.items()}
    times = {method: statistics.median(of_all) for method, of_all in interleaved(steps, repeats, device).items()}
    print(times, memory)
    return {"name": "weight_sync_merge", "seconds": times, "bytes": memory}


if __name__ == "__main__":
    run(__doc__, drift=drift, merge=merge)
