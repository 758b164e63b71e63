"""`smoa demo` refuses what it could not verify."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoa_lab.cli.main import app


def test_a_method_that_saves_a_whole_model_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoa_lab.training.run.load_run", pytest.fail)
    config = Path(__file__).parents[4] / "configs" / "demo.yaml"
    changes = [f"training.output_dir={tmp_path / 'run'}", "method=full", "adapter={}"]
    done = CliRunner().invoke(app, ["demo", str(config), *changes])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: method: full saves a whole model")
    assert not (tmp_path / "run").exists()
