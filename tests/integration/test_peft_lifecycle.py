"""The snippet of the README, whole lives of adapters, and the trainers that drive them unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from smoa import SmoaConfig
from tests.support import tiny_models
from tests.support.decompositions import NoDecomposition
from tests.support.layers import labels, layers_of
from tests.support.tiny_models import logits
from tests.support.tolerance import assert_close


class Repeated(Dataset[dict[str, Tensor]]):
    """The rows of one batch, again and again."""

    def __init__(self, batch: dict[str, Tensor], times: int = 4) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times * len(self.batch["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: tensor[i % len(tensor)] for name, tensor in self.batch.items()}


def factor_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "smoa_" in name}


def adapted(**config: Any) -> PeftModel:
    """The same fresh adapter every time."""
    settings = {"r": 8, "num_blocks": 4, "alpha": 32.0, "target_modules": "all-linear"} | config
    torch.manual_seed(5)
    return get_peft_model(tiny_models.build("llama"), SmoaConfig(**settings))


def train(model: PeftModel, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**tiny_models.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def trainer(model: PreTrainedModel | PeftModel, folder: Path, **arguments: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_steps": 2,
        "logging_steps": 1,
    }
    data = Repeated(tiny_models.batch("llama"))
    return Trainer(model, TrainingArguments(**settings | arguments), train_dataset=data)


def test_the_readmes_snippet_does_what_it_says(tmp_path: Path) -> None:
    base = tiny_models.build("llama")
    model = get_peft_model(base, SmoaConfig(r=32, num_blocks=4, alpha=32, target_modules="all-linear"))
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    assert_close(logits(loaded.merge_and_unload()), expected)


def test_an_adapter_lives_through_training_loading_merging_and_training_again(tmp_path: Path) -> None:
    model = adapted()
    train(model)
    model.save_pretrained(tmp_path / "first")
    with NoDecomposition():
        again = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "first", is_trainable=True)
        again.merge_adapter()
        again.unmerge_adapter()
        train(again)
        train(model)
    assert torch.equal(logits(again), logits(model))
    for own, original in zip(layers_of(again), layers_of(model), strict=True):
        assert labels(own) == labels(original)


def test_resuming_from_a_checkpoint_gives_the_uninterrupted_result(tmp_path: Path) -> None:
    whole = adapted()
    run = trainer(whole, tmp_path / "whole", max_steps=4)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    run.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "final").eval()
    assert torch.equal(logits(loaded), logits(whole.eval()))
    second = adapted()
    trainer(second, tmp_path / "parts", max_steps=4).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    expected, actual = factor_state(whole), factor_state(second)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_gradient_accumulation_and_checkpointing_train_as_one_batch(tmp_path: Path) -> None:
    whole = adapted()
    trainer(whole, tmp_path, max_steps=2, save_strategy="no", max_grad_norm=0.0).train()
    parts = adapted()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "save_strategy": "no"}
    trainer(parts, tmp_path, max_steps=2, max_grad_norm=0.0, **settings).train()
    assert_close(logits(parts.eval()), logits(whole.eval()), dtype=torch.float16)
