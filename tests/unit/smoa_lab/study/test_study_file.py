from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from smoa.errors import ConfigError
from smoa_lab.study.search import sweep_of
from smoa_lab.study.sequence import SequenceRunner
from smoa_lab.study.study import Study
from smoa_lab.study.study_file import load_study, runner_of
from tests.support.studies import tiny_study


def load(values: dict[str, Any], folder: Path) -> Study:
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_study(file)


@pytest.mark.parametrize("place", ["shared", "first", "entries.ours"])
def test_a_study_is_trusted_by_the_command_alone(place: str, sequence: dict[str, Any], tmp_path: Path) -> None:
    load(sequence, tmp_path)
    file = tmp_path / "two.yaml"
    with pytest.raises(ConfigError, match=rf"{place}\.model\.trust_remote_code: a file can't allow"):
        load_study(file, [f"{place}.model.trust_remote_code=true"])
    study = load_study(file, trust_remote_code=True)
    configs = [runner_of(study).config(entry, 1e-3, seed=0) for entry in study.entries.values()]
    assert all(config.model.trust_remote_code for config in configs)


@pytest.mark.parametrize("name", ["smoa/paper", "..", "a\\b"])
def test_an_entry_that_cannot_name_a_folder_is_refused(name: str, sequence: dict[str, Any], tmp_path: Path) -> None:
    sequence["entries"] = {name: sequence["entries"]["ours"]}
    with pytest.raises(ConfigError, match=rf"entries: {re.escape(repr(name))} can't name a folder; leave out slashes"):
        load(sequence, tmp_path)


def test_a_sequence_is_read(sequence: dict[str, Any], tmp_path: Path) -> None:
    study = load(sequence, tmp_path)
    assert isinstance(runner_of(study), SequenceRunner)
    assert [list(sweep_of(study, name)) for name in study.entries] == [[-10, -8], [-12]]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"learnin_rate": 1e-3}, r"1 problem\n  line \d+: first\.learnin_rate: unknown key; .*learning_rate"),
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
    with pytest.raises(ConfigError, match=r"replay: only studies of kind sequence have it"):
        load({**sequence, "first": None, "replay": 5}, tmp_path)
    with pytest.raises(ConfigError, match=r"between: only studies of kind sequence have it"):
        load({**sequence, "first": None, "between": [{"data": {"tasks": ["piqa"]}}]}, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuning": {"sweep": [0.01, 0.001]}}, r"tuning\.sweep: Value error, must be \[lowest, highest\]"),
        (
            {"elsewhere": {"tasks": ["prose"], "test_exampels": 3}},
            r"elsewhere\.test_exampels: unknown key; .*test_examples",
        ),
        ({"elsewhere": {"tasks": ["proze"]}}, r"elsewhere: .*there is no task 'proze'.*'prose'"),
        ({"shared": {"data": {"tasks": ["piqa"]}}}, r"shared\.model: is missing"),
    ],
)
def test_a_wrong_block_is_one_clear_error(
    change: dict[str, Any], message: str, sequence: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(sequence | change, tmp_path)


def test_a_wrong_task_between_is_one_clear_error(sequence: dict[str, Any], tmp_path: Path) -> None:
    sequence["between"] = [{"data": {"tasks": ["arc_ez"]}}]
    with pytest.raises(ConfigError, match=r"entries\.ours\.between\[0\]: 1 problem\n  .*there is no task 'arc_ez'"):
        load(sequence, tmp_path)


def test_all_mistakes_of_keys_are_told_at_once_with_their_lines_and_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "kind: anwsers\nshared: {}\ntuning:\n  refin: true\n"
        "entries:\n  ours:\n    method: smoa\n    learnin_rate: 0.01\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file}: 4 problems"
    told = [
        r"line 1: kind: .*got 'anwsers'; did you mean 'answers'",
        r"line 4: tuning\.refin: unknown key; did you mean 'refine'",
        r"line 6: entries\.ours\.learning_rate: is missing",
        r"line 8: entries\.ours\.learnin_rate: unknown key; did you mean 'learning_rate'",
    ]
    for line, wanted in zip(lines, told, strict=True):
        assert re.match(wanted, line.strip())


def test_a_study_has_one_dtype_on_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: True)
    study = tiny_study(tmp_path)
    assert runner_of(study).config(study.entries["ours"], 0.01, seed=0).model.dtype == "float32"
