"""Gradients that are not finite are kept from the optimizer, and end a run."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.study.finished import loss_of
from smoa_lab.study.run_study import perform
from smoa_lab.study.study import Job
from smoa_lab.training import train as run_module
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run, time_steps
from smoa_lab.training.trainer import Diverged, FiniteSteps
from tests.support import lab


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    training = lab.steps(4, learning_rate=0.01, seed=3)
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=2, training=training, forgetting={"tokens": 0})


def test_a_run_that_diverges_stops_and_can_be_started_again_at_another_rate(config: dict[str, Any]) -> None:
    config["training"] |= {"learning_rate": 1e20, "max_steps": 12, "save_steps": 1}
    rule = r"3 steps in a row, up to step \d of 12, are not finite.*lower training.learning_rate \(1e\+20\)"
    with pytest.raises(Diverged, match=rule):
        run(check_config(config))
    folder = RunFolder(Path(config["training"]["output_dir"]))
    assert not folder.finished
    assert not folder.adapter.exists()
    assert not list(folder.path.glob("checkpoint-*"))
    config["training"]["learning_rate"] = 1e-3
    metrics = run(check_config(config))
    assert metrics["training"]["steps"] == 12
    assert math.isfinite(metrics["evaluation"]["after"]["loss"])


def test_the_command_ends_with_exit_code_1(config: dict[str, Any], tmp_path: Path) -> None:
    config["training"] |= {"learning_rate": 1e20, "max_steps": 12}
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 1
    assert "the run diverged, and no adapter is saved" in result.stderr


def test_a_search_takes_the_rate_as_diverged(config: dict[str, Any], tmp_path: Path) -> None:
    config["training"] |= {"learning_rate": 1e20, "max_steps": 12}
    metrics = perform(Job("search", "smoa", 1e20, 100), check_config(config))
    assert metrics is not None
    assert loss_of(metrics) is None
    folder = RunFolder(Path(config["training"]["output_dir"]))
    assert metrics["training"]["steps"] < 6
    assert folder.finished
    assert folder.rows.is_file()
    assert not folder.adapter.exists()
    elsewhere = config | {"training": config["training"] | {"output_dir": str(tmp_path / "t")}}
    assert time_steps(check_config(elsewhere), 9, 9) > 0


def stepped(guard: FiniteSteps, gradients: list[float], optimizer: Any = None) -> list[Any]:
    """What is left of the gradients of a model, one step for each."""
    model, left = nn.Linear(1, 1, bias=False), []
    state = SimpleNamespace(global_step=4, max_steps=9)
    for gradient in gradients:
        model.weight.grad = torch.tensor([[gradient]])
        arguments = SimpleNamespace(learning_rate=0.5, device=torch.device("cpu"))
        guard.on_pre_optimizer_step(arguments, state, None, model=model, optimizer=optimizer)
        left.append(None if model.weight.grad is None else float(model.weight.grad))
    return left


def test_the_optimizer_gets_no_gradient_that_is_not_finite() -> None:
    assert stepped(FiniteSteps(), [1.0, math.nan, math.inf, 2.0, -math.inf, math.nan, 3.0]) == [
        1,
        None,
        None,
        2,
        None,
        None,
        3,
    ]
    with pytest.raises(Diverged, match="step 5 of 9"):
        stepped(FiniteSteps(), [1.0, math.nan, math.inf, math.nan])


def test_the_scaler_of_fp16_settles_first() -> None:
    scale = [2.0**16]
    guard, optimizer = FiniteSteps(), SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale[0]))
    for _ in range(16 + 2):
        assert math.isnan(stepped(guard, [math.nan], optimizer)[0])  # the scaler skips the step
        scale[0] /= 2
    with pytest.raises(Diverged):
        stepped(guard, [math.nan], optimizer)


@pytest.mark.parametrize(("rate", "diverges"), [(0.01, False), (1e30, True)])
def test_a_run_under_the_scaler_of_fp16_ends_only_once_the_scale_has_settled(
    rate: float, diverges: bool, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where accelerate refuses fp16: its scaler, put into the accelerator. It starts so high that in fp16 the
    first gradients are infinite."""
    scaler, made = torch.amp.GradScaler("cpu", init_scale=2.0**68), run_module.make_trainer

    def with_scaler(*arguments: Any) -> Any:
        trainer: Any = made(*arguments)
        for own in (each for each in trainer.model.parameters() if each.requires_grad):
            own.register_hook(lambda gradient: gradient * math.inf if scaler.get_scale() > 2.0**63 else gradient)
        trainer.accelerator.scaler = scaler
        return trainer

    monkeypatch.setattr(run_module, "make_trainer", with_scaler)
    config["training"] |= {
        "learning_rate": rate,
        "max_steps": 90 if diverges else 24,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
    }
    if diverges:
        with pytest.raises(Diverged, match="gradients of 3 steps in a row"):
            run(check_config(config))
    else:
        assert run(check_config(config))["training"]["steps"] == 24
        assert 2.0**44 < scaler.get_scale() < 2.0**65  # more than three steps were skipped, and not all
