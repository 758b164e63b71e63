"""What tests of several processes share; each file says in its `folder` what the processes left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from tests.slow.workers.strategies import adapted, train_alone


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """Results of rank 0 and of rank 1, by strategy."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> tuple[PeftModel, list[float]]:
    """The trained model of one process that accumulates two micro-batches, and its losses."""
    return train_alone(adapted())
