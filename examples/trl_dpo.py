"""Runs TRL's DPOTrainer from a trained SMoA adapter.

The reference is that adapter, not the base model.
Shows: the reference adapter that TRL copies equals the start in every tensor, so the first loss is ln 2 and the first
margin 0. Training makes the chosen answers likelier than the rejected ones, and the reference does not change.
Printed when last run: reference equals the start; loss 0.693 -> 0.037; margin 0.00 -> 3.52
"""

from __future__ import annotations

import math
import tempfile

from _tiny import ADAPTER, CAPITALS, fit, load
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from trl import DPOConfig, DPOTrainer

from smoa import SmoaConfig


def main() -> None:
    model, tokenizer = load()
    model = get_peft_model(model, SmoaConfig(**ADAPTER))
    fit(model, tokenizer, [(country, "no idea") for country, _ in CAPITALS])
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    data = Dataset.from_list([{"prompt": f"{a}: ", "chosen": b, "rejected": "no idea"} for a, b in CAPITALS])
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            max_steps=20,
            learning_rate=1e-3,
            per_device_train_batch_size=5,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=10,
            logging_first_step=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
        )
        trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        assert_same(start, get_peft_model_state_dict(trainer.model, adapter_name="ref"))
        trainer.train()
    assert_same(start, get_peft_model_state_dict(trainer.model, adapter_name="ref"))
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    margin = f"{first['rewards/margins']:.2f} -> {last['rewards/margins']:.2f}"
    print(f"reference equals the start; loss {first['loss']:.3f} -> {last['loss']:.3f}; margin {margin}")
    assert abs(first["loss"] - math.log(2)) < 1e-3
    assert last["rewards/margins"] > 0.5


def assert_same(start: dict, reference: dict) -> None:
    assert start.keys() == reference.keys()
    assert all(start[name].equal(tensor) for name, tensor in reference.items())


if __name__ == "__main__":
    main()
