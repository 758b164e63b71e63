from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa.errors import MergeError
from smoa_lab.cli.main import app
from smoa_lab.verify import Agreement, _check, verify_saved


def test_what_agrees_passes() -> None:
    _check(Agreement(2.0, 2.0 + 1e-5, 2.0 - 1e-5, logit_difference=5e-5), tolerance=1e-4)


@pytest.mark.parametrize(
    "agreement",
    [
        Agreement(2.0, 2.1, 2.0, logit_difference=0.0),
        Agreement(2.0, 2.0, 1.9, logit_difference=0.0),
        Agreement(2.0, 2.0, 2.0, logit_difference=0.1),
    ],
)
def test_a_saved_adapter_that_is_another_one_is_refused(agreement: Agreement) -> None:
    with pytest.raises(MergeError, match=r"disagrees with the trained one beyond 0\.0001"):
        _check(agreement, tolerance=1e-4)


def test_a_run_that_diverged_is_not_called_the_same() -> None:
    nothing: Any = None
    with pytest.raises(MergeError, match=r"training diverged: .*; lower training\.learning_rate"):
        verify_saved(nothing, nothing, {"evaluation": {"after": {"all": {"gold_loss": math.nan}}}})


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
    monkeypatch.setattr("smoa_lab.training.loaded_run.load_run", pytest.fail)
    config = Path(__file__).parents[3] / "configs" / "demo.yaml"
    done = CliRunner().invoke(app, ["demo", str(config), f"training.output_dir={tmp_path / 'run'}", *overrides])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {told}")
    assert not (tmp_path / "run").exists()
