from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from smoa.errors import ConfigError
from smoa_lab.study.benches.sequence import SequenceBench
from smoa_lab.study.study_file import Study, load_study


def load(values: dict[str, Any], folder: Path) -> Study:
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_study(file)


def test_a_sequence_is_read(sequence: dict[str, Any], tmp_path: Path) -> None:
    study = load(sequence, tmp_path)
    assert isinstance(study.bench(), SequenceBench)
    assert [list(study.rates(name)) for name in study.entries] == [[-10, -8], [-12]]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"learnin_rate": 1e-3}, r"1 problem\n  first\.learnin_rate: Extra inputs are not permitted"),
        ({"method": "loar"}, r"two\.yaml: first: 1 problem\n  method: there is no method 'loar'.*'lora'"),
        ({"data": {"tasks": ["arc_ez"]}}, r"two\.yaml: first: 1 problem\n  .*there is no task 'arc_ez'"),
        ({"training": {"max_step": 3}}, r"two\.yaml: first: 1 problem\n  training\.max_step: .*did you mean"),
        ({"adapter": {"r": 8}}, r"two\.yaml: first: 1 problem\n  adapter: method full trains all weights"),
    ],
)
def test_a_wrong_first_task_is_one_clear_error(
    first: dict[str, Any], message: str, sequence: dict[str, Any], tmp_path: Path
) -> None:
    sequence["first"] |= first
    with pytest.raises(ConfigError, match=message):
        load(sequence, tmp_path)


def test_a_sequence_needs_a_first_task_and_a_sweep(sequence: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two\.yaml: tuning\.sweep: is missing; a study of kind sequence runs"):
        load({**sequence, "tuning": {}}, tmp_path)
    del sequence["first"]
    with pytest.raises(ConfigError, match=r"two\.yaml: first: is missing"):
        load(sequence, tmp_path)


def test_other_studies_have_no_first_task_and_no_sweep_of_one_entry(sequence: dict[str, Any], tmp_path: Path) -> None:
    sequence["kind"] = "answers"
    with pytest.raises(ConfigError, match=r"first: only studies of kind sequence have it, got kind answers"):
        load(sequence, tmp_path)
    with pytest.raises(ConfigError, match=r"tuning\.sweep: is missing; entries\.full has one"):
        load({**sequence, "first": None, "tuning": {}}, tmp_path)
    with pytest.raises(ConfigError, match=r"between: only studies of kind sequence have it"):
        load({**sequence, "first": None, "between": [{"data": {"tasks": ["piqa"]}}]}, tmp_path)


def test_a_wrong_task_between_is_one_clear_error(sequence: dict[str, Any], tmp_path: Path) -> None:
    sequence["between"] = [{"data": {"tasks": ["arc_ez"]}}]
    with pytest.raises(ConfigError, match=r"entries\.ours\.between\[0\]: 1 problem\n  .*there is no task 'arc_ez'"):
        load(sequence, tmp_path)
