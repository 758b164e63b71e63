"""Runs TRL's GRPOTrainer with a SmoaConfig instead of a LoraConfig.

Shows: reinforcement learning with a reward of one's own, here the share of vowels in an answer. A base in bfloat16 that
is merged for the sampler and unmerged again at every step, as TRL does for vLLM, stays the base bit for bit.
Printed when last run: reward 0.02 -> 1.00; after 100 merges the base is the same: True
"""

from __future__ import annotations

import tempfile

import torch
from _tiny import ADAPTER, CAPITALS, load
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from smoa import SmoaConfig


def share_of_vowels(completions: list[str], **_: object) -> list[float]:
    """The reward of each answer."""
    return [sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1) for text in completions]


def main() -> None:
    model, tokenizer = load()
    model.to(torch.bfloat16)
    data = Dataset.from_list([{"prompt": f"{country}: "} for country, _ in CAPITALS])
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder,
            max_steps=40,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=8,
            bf16=False,
            logging_steps=5,
            report_to=[],
        )
        adapter = SmoaConfig(**ADAPTER)  # before: LoraConfig(…)
        trainer = GRPOTrainer(model, share_of_vowels, arguments, data, processing_class=tokenizer, peft_config=adapter)
        base = {name: tensor.clone() for name, tensor in trainer.model.named_parameters() if "smoa_" not in name}
        trainer.train()
    for _ in range(100):
        trainer.model.merge_adapter()
        trainer.model.unmerge_adapter()
    same = all(torch.equal(tensor, base[name]) for name, tensor in trainer.model.named_parameters() if name in base)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}; after 100 merges the base is the same: {same}")
    assert same
    assert rewards[-1] > 2 * rewards[0]


if __name__ == "__main__":
    main()
