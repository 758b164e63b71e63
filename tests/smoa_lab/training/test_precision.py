"""What is trained in the base's own dtype is trained in float32, and scored as it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoa_lab.config import run as config_module
from smoa_lab.config.run import check_config, load_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.init import default_run
from smoa_lab.open_run import open_place
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run
from tests.support import lab


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run whose model names no dtype, where that is bfloat16."""
    monkeypatch.setattr(config_module, "native_dtype", lambda: "bfloat16")
    config = lab.tiny_run(tmp_path, monkeypatch, train=20, test=4, training=lab.steps(20), forgetting={"tokens": 0})
    del config["model"]["dtype"], config["adapter"]
    return config


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize(
    ("method", "adapter", "rate"),
    [
        ("full", {}, 1e-5),
        ("ln_tuning", {}, 1e-4),
        ("lora", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 1e-5),
    ],
    ids=["full", "norms", "copies"],
)
def test_weights_of_the_base_are_trained_in_float32(
    method: str, adapter: dict[str, Any], rate: float, config: dict[str, Any]
) -> None:
    config |= {"method": method, "adapter": adapter}
    config["training"]["learning_rate"] = rate
    checked = check_config(config)
    assert (checked.model.dtype, checked.training["bf16"]) == ("float32", True)
    metrics, folder = run(checked), RunFolder(checked.folder)
    found = open_place(folder.path)
    again = evaluate_run(found)
    assert again["scores"]["loss"] == pytest.approx(metrics["evaluation"]["after"]["loss"], abs=1e-3)
    stored = {name: tensor for file in folder.adapter.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    base = load_file(Path(config["model"]["name"]) / "model.safetensors")
    changed = [
        (tensor != base[key]).flatten()
        for name, tensor in stored.items()
        if "lora_" not in name
        and (key := name.removeprefix("base_model.model.").replace(".ln_tuning_layers", "")) in base
    ]
    assert torch.cat(changed).float().mean() > 0.7  # in bfloat16 a third at most
    assert load_config(folder.config).model.dtype == "float32"


def test_a_dtype_that_is_named_is_taken_and_factors_need_none(config: dict[str, Any], tmp_path: Path) -> None:
    config["method"] = "full"
    named = check_config({**config, "model": {**config["model"], "dtype": "bfloat16"}})
    assert (named.model.dtype, named.training["bf16"]) == ("bfloat16", False)
    config |= {"method": "lora", "adapter": {"r": 2, "target_modules": ["q_proj"]}}
    assert check_config(config).training["bf16"] is False
    places = config["model"]["name"], config["data"]["train"]
    assert default_run(*places, ["method=full"]).training["bf16"] is True
    assert default_run(*places, ["method=full", "model.dtype=bfloat16"]).training["bf16"] is False
