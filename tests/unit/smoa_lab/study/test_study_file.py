from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from smoa.errors import ConfigError
from smoa_lab.study.comparison import load_study, runner_of
from smoa_lab.study.search import sweep_of
from smoa_lab.study.sequence import SequenceRunner
from smoa_lab.study.study import Study
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


def test_a_sequence_is_read(sequence: dict[str, Any], tmp_path: Path) -> None:
    study = load(sequence, tmp_path)
    assert isinstance(runner_of(study), SequenceRunner)
    assert [list(sweep_of(study, name)) for name in study.entries] == [[-10, -8], [-12]]


SWEPT = {"method": "lora", "learning_rate": 0.01, "sweep": [0.01, 0.1]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"entries": {}}, "entries"),
    ({"entries": {"..": SWEPT}}, r"entries: '\.\.' can't name a folder; leave out slashes"),
    ({"entries": {"lora": {**SWEPT, "budget": "lora"}}}, "is both an entry and a budget"),
    (
        {"entries": {"ours": {"method": "smoa", "learning_rate": 0.01, "adapter": {"num_block": 2}}}},
        r"entries\.ours(.|\n)*num_block(.|\n)*did you mean 'num_blocks'",
    ),
    ({"references": ["nobody"]}, "nobody is not an entry; entries: ours, full"),
    ({"tuning": {"max_runs": 1}}, r"tuning\.max_runs"),
    ({"tuning": {"sweep": [0.01, 0.001]}}, r"tuning\.sweep: must be \[lowest, highest\]"),
    ({"tuning": {}}, r"tuning\.sweep: is missing; a study of kind sequence runs"),
    (
        {"elsewhere": {"tasks": ["prose"], "test_exampels": 3}},
        r"elsewhere\.test_exampels: unknown key; .*test_examples",
    ),
    ({"elsewhere": {"tasks": ["proze"]}}, r"elsewhere: .*there is no task 'proze'.*'prose'"),
    ({"shared": {"data": {"tasks": ["piqa"]}}}, r"shared\.model: is missing"),
    ({"between": [{"data": {"tasks": ["arc_ez"]}}]}, r"entries\.ours\.between\[0\]: 1 problem\n  .*no task 'arc_ez'"),
    ({"first": None}, r"two\.yaml: 1 problem\n  first: is missing"),
    ({"first": {"learnin_rate": 1e-3}}, r"line \d+: first\.learnin_rate: unknown key; .*learning_rate"),
    ({"first": {"data": {"tasks": ["arc_ez"]}}}, r"two\.yaml: first: 1 problem\n  .*there is no task 'arc_ez'"),
    ({"first": {"adapter": {"r": 8}}}, r"first: 1 problem\n  adapter: method full trains all weights"),
    ({"kind": "answers"}, r"first: only studies of kind sequence have it, got kind answers"),
    ({"kind": "answers", "first": None, "tuning": {}}, r"tuning\.sweep: is missing; entries\.full has one"),
    ({"kind": "answers", "first": None, "replay": 5}, r"replay: only studies of kind sequence have it"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_study_is_one_clear_error(
    change: dict[str, Any], message: str, sequence: dict[str, Any], tmp_path: Path
) -> None:
    if change.get("first"):
        change = {"first": sequence["first"] | change["first"]}
    with pytest.raises(ConfigError, match=message):
        load(sequence | change, tmp_path)


def test_a_study_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_study(tmp_path / "nowhere.yaml")


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
