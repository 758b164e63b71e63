from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from smoa.atomic import new_folder
from smoa.errors import ConfigError
from smoa_lab.study.sequence import EarlierTask, SequenceRunner
from smoa_lab.study.study_file import Study
from smoa_lab.training.loaded_run import LoadedRun

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def bench(values: dict[str, Any]) -> SequenceRunner:
    found = Study.model_validate(values).bench()
    assert isinstance(found, SequenceRunner)
    return found


def made(values: dict[str, Any]) -> tuple[EarlierTask, dict[str, Any]]:
    """The first stage and its scores, which are only the sum of the model's weights."""
    own = bench(values)
    return own._first_task, own._first_task.scores(own.earlier_records[0], lambda model, _: {"sum": total(model)}, {})


def total(model: torch.nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedRun, "fit", lambda *_: pytest.fail("it was trained already"))


def test_the_first_task_is_trained_once_and_stored(
    sequence: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, found = made(sequence)
    stored = AutoModelForCausalLM.from_pretrained(stage.model.name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert found == {"sum": total(stored), "start": {"sum": total(base)}}
    assert total(stored) != total(base)
    no_training(monkeypatch)
    again, same = made(sequence)
    assert (again.folder, same) == (stage.folder, found)


def test_a_kill_between_training_and_scoring_loses_only_the_scores(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, found = made(sequence)
    next(stage.folder.glob("scores-*.json")).unlink()
    no_training(monkeypatch)
    assert made(sequence)[1] == found


def test_an_interrupted_training_goes_on_from_its_checkpoint(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence["first"]["training"] = {"save_strategy": "steps", "save_steps": 1}
    place = "smoa_lab.study.sequence.new_folder"
    monkeypatch.setattr(place, lambda _: pytest.fail("killed before the model is stored"))
    with pytest.raises(pytest.fail.Exception):
        made(sequence)
    monkeypatch.setattr(place, new_folder)
    checkpoints = []
    real_fit = LoadedRun.fit

    def fit(*arguments: Any) -> Any:
        checkpoints.append(Path(arguments[-1]).name)
        return real_fit(*arguments)

    monkeypatch.setattr(LoadedRun, "fit", fit)
    stage, _ = made(sequence)
    assert checkpoints == ["checkpoint-2"]
    *others, scores = sorted(file.name for file in stage.folder.iterdir())
    assert (others, scores[:7]) == (["lock", "model"], "scores-")


def test_an_adapter_is_merged_and_stored_in_the_models_dtype(sequence: dict[str, Any], tmp_path: Path) -> None:
    sequence["shared"]["model"]["dtype"] = "bfloat16"
    adapter = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj"]}
    sequence["first"] |= {"method": "smoa", "adapter": adapter, "learning_rate": 0.1, "model": {"dtype": "float32"}}
    stage, _ = made(sequence)
    stored = AutoModelForCausalLM.from_pretrained(stage.model.name, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    changed = {
        name
        for (name, new), (_, old) in zip(stored.named_parameters(), base.named_parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_another_first_task_is_another_stage(sequence: dict[str, Any]) -> None:
    stage = bench(sequence)._first_task
    sequence["first"]["learning_rate"] = 2e-3
    assert bench(sequence)._first_task.folder != stage.folder


def test_a_training_that_diverges_is_not_stored(sequence: dict[str, Any]) -> None:
    sequence["first"]["learning_rate"] = 1e38
    with pytest.raises(ConfigError, match=r"first\.learning_rate: the first task's training diverged"):
        made(sequence)
    assert not Path(bench(sequence)._first_task.model.name).exists()
