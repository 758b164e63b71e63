from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.config.run import RunConfig, check_config
from smoa_lab.evaluate import evaluate_run
from tests.support import lab

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two steps."""
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=lab.steps(2, save_strategy="no"))


@pytest.fixture
def untested(values: dict[str, Any]) -> RunConfig:
    """The same with nothing held out."""
    values["data"]["test_examples"] = 0
    return check_config(values)


def test_scoring_nothing_is_refused(untested: RunConfig) -> None:
    with pytest.raises(DataError, match=r"nothing is held out that could be scored"):
        evaluate_run(untested)
