"""TRL's trainers for preferences and rewards train a SMoA adapter, and merges leave its bfloat16 base alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from transformers import LlamaForSequenceClassification, TrainerCallback

from smoa import SmoaConfig
from tests.support.lab import byte_tokenizer, tiny_llama
from tests.support.own_rows import pairs

OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {"num_generations": 4, "max_completion_length": 4, "beta": 0.1},
    "DPO": {},
    "Reward": {},
}


def of_letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between the answers of a random model."""
    return [sum(map(ord, text)) / 1000 for text in completions]


class Syncing(TrainerCallback):
    """Merges and unmerges after each step, as TRL does to send the weights to vLLM."""

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        model.merge_adapter()
        model.unmerge_adapter()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_trainer_trains_the_adapter_and_changes_neither_base_nor_reference(name: str, tmp_path: Path) -> None:
    tokenizer, model, kind = byte_tokenizer(), tiny_llama(259, positions=64), "CAUSAL_LM"
    if name == "Reward":
        model.config.num_labels, kind = 1, "SEQ_CLS"
        model = LlamaForSequenceClassification(model.config)
    config = SmoaConfig(r=4, num_blocks=2, target_modules="all-linear", task_type=kind, init_weights=False)
    adapted = get_peft_model(model.to(torch.bfloat16), config)
    start = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(adapted).items()}
    base = {key: tensor.clone() for key, tensor in adapted.named_parameters() if not tensor.requires_grad}
    given: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4, "bf16": False}
    arguments = getattr(trl, f"{name}Config")(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", **given, **OPTIONS[name]
    )
    arguments.dataloader_pin_memory = False
    trainer = getattr(trl, f"{name}Trainer")(
        adapted,
        args=arguments,
        train_dataset=Dataset.from_list(pairs(8)),
        processing_class=tokenizer,
        callbacks=[Syncing()],
        **({"reward_funcs": of_letters} if name == "GRPO" else {}),
    )
    trainer.train()
    trained = get_peft_model_state_dict(adapted)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    assert all(not torch.equal(trained[key], start[key]) for key in start if "smoa_A" in key or "smoa_B" in key)
    kept = dict(adapted.named_parameters())
    assert all(torch.equal(kept[key], tensor) for key, tensor in base.items())
    if name != "Reward":
        reference = get_peft_model_state_dict(adapted, adapter_name="ref")
        assert all(torch.equal(reference[key], tensor) for key, tensor in start.items())
