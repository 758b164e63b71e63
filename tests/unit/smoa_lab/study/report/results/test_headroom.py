from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoa.errors import DataError
from smoa_lab.study.report.results.headroom import HEADROOM_HEADER, Gain, gain, headroom_line, is_of_headroom
from smoa_lab.study.report.results.statistics import outcomes
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial
from tests.support import studies

CONFIG = {"data": {"tasks": ["reuters"]}, "model": {"name": "encoder"}, "adapter": {"r": 1}}


def run(right: list[int]) -> dict[str, Any]:
    zeros, ones = [0.0] * len(right), [1] * len(right)
    return {"questions": {"task": ["reuters"] * len(right), "nll": zeros, "tokens": ones, "right": right}}


def test_the_error_of_one_seed_is_that_of_paired_questions() -> None:
    after, before = [1, 1, 1, 0], [0, 1, 0, 0]
    found = gain(outcomes([run(after)]), outcomes([run(before)]))
    assert found.mean == 0.5
    assert found.stderr == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)


def test_seeds_that_differ_add_to_the_error() -> None:
    after = outcomes([run([1, 1, 1, 0]), run([0, 1, 0, 0])])
    found = gain(after, outcomes([run([0, 1, 0, 0])]))
    assert found.mean == 0.25
    of_seeds = np.std([0.5, 0.0], ddof=1) / 2**0.5
    assert found.stderr == pytest.approx(np.hypot(np.std([0.5, 0, 0.5, 0], ddof=1) / 2, of_seeds))


@pytest.mark.parametrize(("stderr", "clear"), [(0.1, True), (0.11, False), (0.0, True)])
def test_three_standard_errors_are_clear(stderr: float, clear: bool) -> None:
    assert Gain(0.3 + 1e-9, stderr).is_clear is clear


def finish(study: Study, entry: str, seed: int, right: list[int]) -> None:
    config = {**CONFIG, "training": {"learning_rate": 0.01, "seed": seed}}
    studies.finish(study, Trial("final", entry, 0.01, seed), 1.0, **run(right), config=config)


def summarize(study: Study, **seeds: list[int]) -> None:
    rows = [{"entry": name, "learning_rate": 0.01, "seeds": found} for name, found in seeds.items()]
    (study.folder / "summary.json").write_text(json.dumps(rows))


def test_a_study_is_one_line(study: Study, tmp_path: Path) -> None:
    (study.folder).mkdir()
    (study.folder / "untouched.json").write_text(
        '{"questions": ' + str(run([0] * 40)["questions"]).replace("'", '"') + "}"
    )
    for seed in (0, 1):
        finish(study, "lora", seed, [1] * 20 + [0] * 20)
        finish(study, "full", seed, [1] * 36 + [0] * 4)
    finish(study, "full", 2, [0] * 40)  # which lora lacks
    assert not is_of_headroom(study.folder)
    summarize(study, lora=[0, 1], full=[0, 1, 2])
    assert is_of_headroom(study.folder)
    line = headroom_line(study.folder)
    assert dict(zip(HEADROOM_HEADER, line, strict=True)) == {
        "task": "reuters",
        "model": "encoder",
        "seeds": "2",
        "untouched %": "0.0",
        "LoRA's r": "1",
        "LoRA %": "50.0",
        "full %": "90.0",
        "better of both − untouched": "+90.0 ± 4.8",
        "moves": "yes",
        "full − LoRA": "+40.0 ± 7.8",
        "standard errors": "5.1",
        "headroom": "yes",
    }


def test_a_study_without_full_fine_tuning_is_told(study: Study) -> None:
    finish(study, "lora", 0, [1] * 40)
    summarize(study, lora=[0])
    with pytest.raises(DataError, match="headroom needs the untouched model and final runs of lora and full"):
        headroom_line(study.folder)
