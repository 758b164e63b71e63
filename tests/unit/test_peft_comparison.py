"""The experiment for PEFT's own comparison is one that PEFT reads, and it trains what its LoRA of rank 32 trains."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftConfig

from smoa import SmoaConfig
from smoa.maths.budget import trainable_parameters

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peft_comparison" / "experiments" / "smoa"
LLAMA_3B = {"q_proj": (3072, 3072), "v_proj": (1024, 3072)}
LORA_32 = 9_175_040


def test_the_experiment_trains_as_many_parameters_as_lora_at_its_alpha_and_rate() -> None:
    (experiment,) = FOLDER.iterdir()
    assert sorted(file.name for file in experiment.iterdir()) == ["adapter_config.json", "training_params.json"]
    config = PeftConfig.from_pretrained(str(experiment))
    assert isinstance(config, SmoaConfig)
    shapes = [LLAMA_3B[target] for target in sorted(config.target_modules)]
    assert 28 * sum(trainable_parameters(*shape, config.r, config.num_blocks) for shape in shapes) == LORA_32
    assert config.alpha / config.r == 64 / 32
    assert json.loads((experiment / "training_params.json").read_text())["optimizer_kwargs"]["lr"] == 1e-4
