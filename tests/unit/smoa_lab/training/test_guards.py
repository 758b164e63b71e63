"""A run tries whether gradients reach what it trains, and stops where they can't."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from typer.testing import CliRunner

from smoa.errors import ConfigError
from smoa_lab.base_models import RunModel
from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.study.metrics import loss_of
from smoa_lab.study.run_study import perform
from smoa_lab.study.study import Job
from smoa_lab.training import guards
from smoa_lab.training import train as run_module
from smoa_lab.training.guards import Diverged, Guard
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run, time_steps
from tests.support import lab

IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def opt(vocabulary: int) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary, word_embed_proj_dim=32, max_position_embeddings=512, init_std=0.2, **sizes, **IDS
        )
    )


def falcon(vocabulary: int) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    return FalconForCausalLM(
        FalconConfig(vocab_size=vocabulary, parallel_attn=True, initializer_range=0.2, **sizes, **IDS)
    )


def gptj(vocabulary: int) -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(vocab_size=vocabulary, initializer_range=0.2, **sizes, **IDS))


FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": lambda vocabulary: lab.tiny_llama(vocabulary, 512),
    "falcon": falcon,
    "gptj": gptj,
    "opt": opt,
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    training = lab.steps(4, learning_rate=0.01, seed=3)
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=2, training=training, forgetting={"tokens": 0})


def of_family(config: dict[str, Any], family: str, folder: Path) -> dict[str, Any]:
    tokenizer = lab.byte_tokenizer()
    torch.manual_seed(0)
    lab.saved(FAMILIES[family](len(tokenizer)), tokenizer, folder)
    return {**config, "model": {"name": str(folder), "dtype": "float32"}}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a trial was made: one entry for each."""
    made: list[bool] = []
    original = guards.try_gradients

    def noted(trainer: Any, step: Any, trains: bool) -> None:
        made.append(trains)
        original(trainer, step, trains)

    monkeypatch.setattr(guards, "try_gradients", noted)
    return made


@pytest.mark.parametrize("method", ["smoa", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_train_pass_the_trial(
    family: str, method: str, config: dict[str, Any], tmp_path: Path, tried: list[bool]
) -> None:
    config = of_family(config, family, tmp_path / family)
    targets = {"adapter": {"r": 4, "target_modules": "all-linear"}}
    metrics = run(check_config({**config, "method": method, **targets}))
    assert tried == [True]
    assert metrics["training"]["steps"] == 4


@pytest.mark.parametrize(
    ("adapter", "training"),
    [
        ({"dropout": 0.5}, {}),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
        ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ({"modules_to_save": ["lm_head"]}, {}),
        ({}, {"neftune_noise_alpha": 5.0}),
    ],
    ids=["dropout", "embeddings", "reentrant", "checkpointing", "copies", "neftune"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("method", ["smoa", "lora"])
def test_a_trial_passes_and_changes_nothing(
    method: str,
    adapter: dict[str, Any],
    training: dict[str, Any],
    config: dict[str, Any],
    tried: list[bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {f"{method}_{key}" if key == "dropout" else key: value for key, value in adapter.items()}
    config["adapter"] = {"r": 4, "target_modules": ["q_proj", "down_proj"], **own}
    config |= {"method": method, "training": {**config["training"], **training}}
    first = run(check_config(config))
    assert tried == [True]
    monkeypatch.setattr(guards.Guard, "look", lambda *_: None)
    config["training"]["output_dir"] = str(tmp_path / "untried")
    second = run(check_config(config))
    assert first["evaluation"] == second["evaluation"]
    same = ("loss", "grad_norm", "num_tokens")
    histories = [[{key: one.get(key) for key in same} for one in each["history"]] for each in (first, second)]
    assert histories[0] == histories[1]


def cut_off(module: Any, x: Tensor) -> Tensor:
    """A layer's product without its backward."""
    with torch.no_grad():
        return nn.functional.linear(x, module.weight)


def zeroed(module: Any, x: Tensor) -> Tensor:
    """A layer's product with a backward of zeros."""
    return nn.functional.linear(x, module.weight).detach() + 0 * nn.functional.linear(x, module.weight)


@pytest.mark.parametrize("forward", [cut_off, zeroed])
@pytest.mark.parametrize(
    ("method", "layers", "told"),
    [
        ("lora", "o_proj|down_proj", r"layers.0.self_attn.o_proj, .*down_proj"),
        ("dora", "o_proj|down_proj", r"layers.0.self_attn.o_proj, .*down_proj"),
        ("lora", "gate_proj", r"layers.0.mlp.gate_proj"),  # whose input up_proj has too
    ],
)
def test_a_layer_that_gradients_do_not_pass_stops_a_run(
    method: str,
    layers: str,
    told: str,
    forward: Callable[..., Tensor],
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = RunModel.load

    def broken(self: RunModel) -> Any:
        base: Any = original(self)
        for name, layer in base.named_modules():
            if name.endswith(tuple(layers.split("|"))):
                layer.forward = forward.__get__(layer)
        return base

    monkeypatch.setattr(RunModel, "load", broken)
    config |= {"method": method, "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    with pytest.raises(ConfigError, match=rf"no gradient passes .*{told}"):
        run(check_config(config))
    folder = RunFolder(Path(config["training"]["output_dir"]))
    assert not folder.finished
    assert not folder.adapter.exists()


def test_a_model_that_gives_no_gradient_to_anything_stops_a_run(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits.detach() + 0 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ConfigError, match="no gradient reaches any trained tensor"):
        run(check_config(config))


def test_a_frozen_layer_of_zeros_is_no_fault(config: dict[str, Any], tmp_path: Path) -> None:
    model = lab.tiny_llama(len(lab.byte_tokenizer()), 512)
    nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    config["model"]["name"] = str(lab.saved(model, lab.byte_tokenizer(), tmp_path / "zeros"))
    config |= {"method": "lora", "adapter": {"r": 4, "target_modules": ["up_proj", "v_proj"]}}
    assert run(check_config(config))["training"]["steps"] == 4


def test_tensors_without_a_gradient_are_named(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: original(self, x).detach())
    config["adapter"] = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "up_proj"]}
    config["training"]["max_steps"] = 11
    with caplog.at_level("WARNING", "smoa_lab"):
        run(check_config(config))
    assert "4 trained tensors had no gradient in 10 steps: " in caplog.text
    assert "up_proj" in caplog.text


def test_a_batch_that_trains_nothing_is_not_tried() -> None:
    guard, tries = guards.Guard(), list[int]()
    trainer: Any = type("T", (), {"state": type("S", (), {"global_step": 0})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "_untried", lambda trainer: tries.append(1) or "noted")
        for labels in ([[5, -100, -100]], [[-100, -100, 7]], [[5, 6, 7]]):
            guard.look(trainer, {"labels": torch.tensor(labels)}, lambda: None)
    assert guard.without == 1
    assert tries == [1]


# gradients that are not finite


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
    assert time_steps(
        check_config({**config, "training": {**config["training"], "output_dir": str(tmp_path / "t")}}), 9, 9
    )


def stepped(guard: Guard, gradients: list[float], optimizer: Any = None) -> list[Any]:
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
    assert stepped(Guard(), [1.0, math.nan, math.inf, 2.0, -math.inf, math.nan, 3.0]) == [
        1,
        None,
        None,
        2,
        None,
        None,
        3,
    ]
    with pytest.raises(Diverged, match="step 5 of 9"):
        stepped(Guard(), [1.0, math.nan, math.inf, math.nan])


def test_steps_that_changed_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    stepped(guard, [1.0, math.nan, math.inf, 2.0, math.nan])
    guard.on_train_end(None, None, None)
    assert "3 of 5 steps had gradients that are not finite, and changed nothing" in caplog.text


def test_a_batch_without_trained_tokens_does_not_count() -> None:
    guard = Guard()
    for _ in range(5):
        guard.look(SimpleNamespace(state=SimpleNamespace(global_step=1)), {"labels": torch.tensor([[4, -100]])}, stop)
        assert stepped(guard, [math.nan]) == [None]
    assert guard.without == 5
    assert stepped(guard, [math.nan, math.nan]) == [None, None]


def stop() -> None:
    raise AssertionError


def test_the_scaler_of_fp16_settles_first() -> None:
    scale = [2.0**16]

    def halve(steps: int) -> None:
        for _ in range(steps):
            assert math.isnan(stepped(guard, [math.nan], optimizer)[0])  # the scaler skips the step
            scale[0] /= 2

    guard, optimizer = Guard(), SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale[0]))
    halve(16 + 2)
    with pytest.raises(Diverged):
        halve(1)
    guard, scale = Guard(), [2.0**16]
    halve(5)
    assert stepped(guard, [1.0], optimizer) == [1]
    halve(2)
    with pytest.raises(Diverged):
        halve(1)


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
    config["training"] |= {"learning_rate": rate, "max_steps": 24, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    if diverges:
        with pytest.raises(Diverged, match="gradients of 3 steps in a row"):
            run(check_config(config))
    else:
        assert run(check_config(config))["training"]["steps"] == 24
        assert 2.0**44 < scaler.get_scale() < 2.0**65  # more than three steps were skipped, and not all
