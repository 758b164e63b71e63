"""A run that is killed after a checkpoint and started again ends in the bits of the run that nobody stopped, of every
kind that has something of its own to remember."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoa_lab.training.train import run as train
from tests.support.lab import chats, killed_after_saving, losses, rows_base, rows_config, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.usefixtures("quick_pictures"),
]
VALIDATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 64}
DROPPED = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"], "smoa_dropout": 0.3}
ADALORA = {"target_modules": ["q_proj"], "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 4}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"adapter": DROPPED},
    "packing": {"training": {"packing": True, "packing_strategy": "bfd"}, "data": {"max_length": 128}},
    "accumulation": {"training": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}},
    "early stopping": {"training": {**VALIDATED, "learning_rate": 30.0, "warmup_steps": 0}, "early_stopping": 2},
    "plateau": {"training": {**VALIDATED, "lr_scheduler_type": "reduce_lr_on_plateau", "learning_rate": 0.5}},
    "group_by_length": {"training": {"train_sampling_strategy": "group_by_length"}},
    "AdaLoRA": {"method": "adalora", "adapter": ADALORA},
    "NEFTune": {"training": {"neftune_noise_alpha": 5.0}},
    "last step": {"killed_after": 4, "training": {"lr_scheduler_type": "polynomial"}},  # which divides by the steps
    "no patience left": {
        "killed_after": 3,
        "training": {**VALIDATED, "learning_rate": 0.0, "max_steps": 8},
        "early_stopping": 2,
    },
}
STEPS = {"early stopping": 3, "no patience left": 3}
"""Of a run that ends before its fourth step."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    of_kind = dict(KINDS[kind])
    killed_after = of_kind.pop("killed_after", 2)
    rows = write_rows(tmp_path / "rows.jsonl", chats(40))
    training = {"max_steps": 4, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 1}
    sections = {
        "forgetting": {"tokens": 0},
        **of_kind,
        "data": {"samples": 0, "validation_examples": 4, "test_examples": 4, **of_kind.get("data", {})},
    }
    whole, broken = (
        rows_config(
            tmp_path / name,
            rows,
            rows_base(tmp_path / "base"),
            **{**sections, "training": {**training, "output_dir": str(tmp_path / name), **of_kind.get("training", {})}},
        )
        for name in ("whole", "broken")
    )
    expected = train(whole)
    with killed_after_saving(killed_after, monkeypatch):
        train(broken)
    found = train(broken)
    assert found["training"]["resumed"]
    assert found["training"]["steps"] == expected["training"]["steps"] == STEPS.get(kind, 4)
    assert losses(found) == losses(expected)
    assert found["evaluation"] == expected["evaluation"]
    saved, unbroken = (load_file(one.folder / "adapter" / "adapter_model.safetensors") for one in (broken, whole))
    assert saved.keys() == unbroken.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in unbroken.items())
    for one in (whole, broken):
        assert not [entry for entry in one.folder.iterdir() if entry.name == "README.md" or "checkpoint" in entry.name]
