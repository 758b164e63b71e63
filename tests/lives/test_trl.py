"""TRL's trainers for preferences and rewards train a SMoA adapter, and merges leave its bfloat16 base alone. Its
supervised one trains several by the names that a collator adds, also when it resumes."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import LlamaForSequenceClassification, TrainerCallback

from smoa import SmoaConfig
from tests.support.lab import byte_tokenizer, pairs, tiny_llama

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


class SeveralAtOnce(trl.SFTTrainer):
    """As the page on several adapters has it: what was resumed trains all adapters again."""

    def create_optimizer(self, *args: Any) -> Any:
        self.model.set_requires_grad(["anna", "ben"])
        return super().create_optimizer(*args)


def collated(rows: list[dict[str, Any]], who: list[str]) -> dict[str, Any]:
    ids = torch.stack([torch.tensor(row["input_ids"]) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": ids > 0,
        "labels": ids,
        "adapter_names": [who[row["person"]] for row in rows],
    }


def supervised(folder: Path, who: list[str], steps: int, resumes: bool = False) -> dict[str, Tensor]:
    """What each of two adapters is after so many steps; `who` are the adapters of two people."""
    tokenizer, config = byte_tokenizer(), {"r": 4, "num_blocks": 2, "target_modules": "all-linear"}
    model = get_peft_model(tiny_llama(259, positions=64).double(), SmoaConfig(**config), "anna")
    model.add_adapter("ben", SmoaConfig(**config))
    arguments = trl.SFTConfig(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        bf16=False,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        save_steps=2,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": [5 + (i * 7 + j) % 90 for j in range(8)], "person": i % 2} for i in range(16)]
    collator: Any = functools.partial(collated, who=who)
    trainer = SeveralAtOnce(model, arguments, collator, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resumes)
    states = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("anna", "ben")}
    return {f"{name} {key}": value for name, state in states.items() for key, value in state.items()}


def test_the_supervised_trainer_trains_adapters_by_name_and_resumes_all_of_them(tmp_path: Path) -> None:
    whole = supervised(tmp_path / "whole", ["anna", "ben"], 4)
    supervised(tmp_path / "parts", ["anna", "ben"], 2)
    resumed = supervised(tmp_path / "parts", ["anna", "ben"], 4, resumes=True)
    assert whole.keys() == resumed.keys()
    for key, value in resumed.items():
        torch.testing.assert_close(value, whole[key])
    alone = supervised(tmp_path / "alone", ["anna", "__base__"], 4)
    for key, value in alone.items():  # the loss is a mean over all tokens: hers is the same without ben's adapter
        trains = "smoa_A" in key or "smoa_B" in key
        assert torch.allclose(value, whole[key]) == (key.startswith("anna") or not trains)
