from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from tests.support.own_rows import chats, rows_values, write_rows


def test_a_run_on_rows_is_refused_in_one_line(tmp_path: Path) -> None:
    values = rows_values(tmp_path, write_rows(tmp_path / "rows.jsonl", chats(3)), tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "run.yaml")])
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {tmp_path}/run.yaml: trains on rows, and smoa tune compares losses on questions; "
        "2e-4 is a usual start\n"
    )
