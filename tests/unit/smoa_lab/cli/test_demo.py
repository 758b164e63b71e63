"""`smoa demo` refuses what it could not verify, and a saved adapter that is not the one that was trained."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from typer.testing import CliRunner

from smoa.errors import MergeError
from smoa_lab import base_models
from smoa_lab.cli.demo import verify_saved
from smoa_lab.cli.main import app
from smoa_lab.training import loaded_run, train_run


class Model:
    """An adapted model of this loss and these logits, and what it is when merged."""

    device = torch.device("cpu")

    def __init__(self, loss: float, logit: float, merged: Model | None = None) -> None:
        self.loss, self.logit, self.merged = loss, logit, merged

    def eval(self) -> Model:
        return self

    def merge_and_unload(self, safe_merge: bool) -> Model:
        assert safe_merge
        assert self.merged is not None
        return self.merged

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.tensor([[[self.logit, -2.0]]]))


def verified(monkeypatch: pytest.MonkeyPatch, trained: float, reloaded: Model) -> str:
    monkeypatch.setattr(base_models, "load_base_model", lambda section: (None, None))
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda base, folder: reloaded)
    config: Any = SimpleNamespace(model=SimpleNamespace(dtype="float32"), folder=Path("run"))
    run: Any = SimpleNamespace(
        encoder=SimpleNamespace(gold=lambda row: SimpleNamespace(prompt=[1, 2])),
        test_rows=["row"],
        held_out_losses=lambda model: SimpleNamespace(mean=model.loss),
    )
    return verify_saved(config, run, {"evaluation": {"after": {"all": {"gold_loss": trained}}}})


def test_what_agrees_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = verified(monkeypatch, 2.0, Model(2.0 + 1e-5, 1.0, Model(2.0 - 1e-5, 1.0001)))
    assert "as trained 2.000000, reloaded onto a fresh base model 2.000010, merged 1.999990: they agree" in told


@pytest.mark.parametrize(
    "reloaded",
    [Model(2.1, 1.0, Model(2.0, 1.0)), Model(2.0, 1.0, Model(1.9, 1.0)), Model(2.0, 1.0, Model(2.0, 1.1))],
    ids=["reloaded", "merged", "logits"],
)
def test_a_saved_adapter_that_is_another_one_is_refused(reloaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MergeError, match=r"not the one that was trained.* disagree"):
        verified(monkeypatch, 2.0, reloaded)


def test_a_run_that_diverged_is_not_called_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MergeError, match=r"training diverged: .*; lower training\.learning_rate"):
        verified(monkeypatch, math.nan, Model(2.0, 1.0))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=full", "adapter={}"], "method: full saves a whole model"),
        (["data.test_examples=0"], "data.test_examples: 0 holds no questions out"),
        (["data={train: rows.jsonl}", "task=null"], "data: names rows"),
    ],
)
def test_the_demo_refuses_what_could_not_be_verified_before_any_work(
    overrides: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loaded_run, train_run):
        monkeypatch.setattr(module, "load_run", pytest.fail)
    config = Path(__file__).parents[4] / "configs" / "demo.yaml"
    done = CliRunner().invoke(app, ["demo", str(config), f"training.output_dir={tmp_path / 'run'}", *overrides])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {told}")
    assert not (tmp_path / "run").exists()
