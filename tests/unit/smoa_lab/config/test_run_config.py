from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import ConfigError
from smoa_lab.config.problems import nearest
from smoa_lab.config.run_config import load_config

CONFIGS = Path(__file__).parents[4] / "configs"
GOOD = """
model: {name: base}
method: smoa
adapter: {r: 4, num_blocks: 2, target_modules: [q_proj]}
data: {tasks: [arc_easy]}
training: {output_dir: runs/x, learning_rate: 1e-2, max_steps: 3}
"""
FIVE_MISTAKES = """\
model:
  name: base
  dtype: flot32
method: smoa
adapter:
  r: 4
  num_block: 2
data:
  tasks: [arc_esy]
task:
  max_lenght: 100
training:
  learning_rat: 1e-3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_ready_config_is_valid(path: Path) -> None:
    # Without use_cpu a config for a GPU is refused where there is none, as it should be.
    assert load_config(path, ["training.use_cpu=true"]).data.tasks


def test_numbers_in_exponent_notation_are_numbers(file: Path) -> None:
    file.write_text(GOOD)
    assert load_config(file).training["learning_rate"] == 0.01


def test_no_is_a_word_and_false_is_not(file: Path) -> None:
    file.write_text(GOOD)
    training = load_config(file, ["training.eval_strategy=no", "training.bf16=false"]).training
    assert (training["eval_strategy"], training["bf16"]) == ("no", False)


def test_an_override_changes_one_value(file: Path) -> None:
    file.write_text(GOOD)
    config = load_config(file, ["training.learning_rate=3e-3", "data.tasks=[piqa, boolq]"])
    assert config.training["learning_rate"] == 0.003
    assert config.data.tasks == ["piqa", "boolq"]


def test_five_mistakes_are_reported_at_once_with_line_and_nearest_name(file: Path) -> None:
    file.write_text(FIVE_MISTAKES)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{file}: 5 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["line 3", "line 7", "line 9", "line 11", "line 13"]
    for line, name in zip(lines[1:], ["float32", "num_blocks", "arc_easy", "max_length", "learning_rate"], strict=True):
        assert f"did you mean '{name}'?" in line


def test_a_value_of_the_wrong_type_is_named(file: Path) -> None:
    file.write_text(GOOD)
    with pytest.raises(ConfigError, match=r"training.max_steps: .*integer.*got 'many'"):
        load_config(file, ["training.max_steps=many"])


def test_a_rule_of_the_adapter_config_is_reported(file: Path) -> None:
    file.write_text(GOOD)
    with pytest.raises(ConfigError, match=r"adapter: .*num_blocks"):
        load_config(file, ["adapter.num_blocks=0"])


def test_what_the_method_decides_cannot_be_set(file: Path) -> None:
    file.write_text(GOOD)
    with pytest.raises(ConfigError, match=r"adapter.partition: is decided by method melora"):
        load_config(file, ["method=melora", "adapter.partition=spectral"])


def test_an_unknown_method_names_the_nearest(file: Path) -> None:
    file.write_text(GOOD)
    with pytest.raises(ConfigError, match="no method 'smao'; did you mean 'smoa'"):
        load_config(file, ["method=smao"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "line 1"), ("- 1", "must hold the blocks"), ("model: 1\nmodel: 2", "line 2: .*given twice")],
)
def test_text_that_is_no_config_is_refused_with_its_place(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_an_override_without_a_value_is_refused(file: Path) -> None:
    file.write_text(GOOD)
    with pytest.raises(ConfigError, match="an override is written"):
        load_config(file, ["training.seed"])


def test_an_unknown_key_inside_a_table_of_ones_own_is_named_without_a_guess(file: Path) -> None:
    file.write_text(GOOD)
    with pytest.raises(ConfigError, match=r"data\.files\.own\.trian: unknown key$") as caught:
        load_config(file, ["data.files={own: {train: a.csv, trian: b.csv}}"])
    assert "1 problem" in str(caught.value)


def test_a_name_like_none_is_answered_with_all_where_they_are_few() -> None:
    few, many = ["one", "two"], [f"name{i}" for i in range(13)]
    assert nearest("zzz", few) == "; choose from one, two"
    assert nearest("zzz", many) == nearest("zzz", []) == ""
    assert nearest("nam3", many).endswith("did you mean 'name3'?")
