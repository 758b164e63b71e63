"""A merged model needs nothing of ours: it is loaded by a Python that can't find smoa."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from smoa import SmoaConfig
from smoa_lab.merge import merge_run
from tests.support import tiny_models
from tests.support.tolerance import assert_close

# Isolated and without `site`, the only packages on the path are those in the folder itself: what was installed in
# editable mode, as smoa is here, is reached by a .pth file that nobody reads.
PROGRAM = """
import importlib.util, sys
sys.path.append({packages!r})
assert importlib.util.find_spec("smoa") is None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}).eval()
inputs = load_file({inputs!r})
with torch.no_grad():
    save_file({{"logits": model(**inputs).logits}}, {output!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_models.CAUSAL)
def test_plain_transformers_loads_a_merged_model(family: str, tmp_path: Path) -> None:
    base = tiny_models.build(family)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    config = SmoaConfig(r=4, num_blocks=2, init_weights=False, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_run(tmp_path / "adapter", tmp_path / "merged", max_shard_size="20KB")
    inputs = tiny_models.batch(family)
    save_file(inputs, tmp_path / "inputs.safetensors")
    program = PROGRAM.format(
        packages=str(Path(transformers.__file__).parents[1]),
        folder=str(tmp_path / "merged"),
        inputs=str(tmp_path / "inputs.safetensors"),
        output=str(tmp_path / "logits.safetensors"),
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected)
