"""The README is run, so that it can't rot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
BASE_MODEL = "google/gemma-3-270m"


def test_the_python_of_the_readme_runs(
    tiny_gemma3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a folder takes the place of the model of that name
    tiny_gemma3.save_pretrained(BASE_MODEL)
    before = {name: weight.clone() for name, weight in tiny_gemma3.state_dict().items()}
    names: dict[str, object] = {}
    for block in PYTHON_BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    merged = names["merged"]
    assert isinstance(merged, PreTrainedModel)
    assert merged.state_dict().keys() == before.keys()
    assert (tmp_path / "out" / "adapter_config.json").is_file()
