from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from smoa_lab.study.trials import TrialStore


def test_a_trial_that_diverged_is_stored_as_json_that_others_can_read(tmp_path: Path) -> None:
    result = {"config": {"training": {}}, "scores": {"all": {"gold_loss": math.inf}}, "questions": {"nll": [math.nan]}}
    store = TrialStore(tmp_path)
    first = store.get("final/lora/x", {}, lambda work: result)
    assert json.loads(store.file("final/lora/x").read_text(), parse_constant=pytest.fail) == first
    assert (first["scores"]["all"]["gold_loss"], first["questions"]["nll"]) == (None, [None])
