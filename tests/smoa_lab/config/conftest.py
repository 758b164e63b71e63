from pathlib import Path

import pytest

RUN = """
model: {name: base}
method: smoa
adapter: {r: 4, num_blocks: 2, target_modules: [q_proj]}
data: {train: rows.jsonl}
training: {output_dir: runs/x, learning_rate: 1e-2, max_steps: 3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run's YAML file, without a mistake."""
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return file
