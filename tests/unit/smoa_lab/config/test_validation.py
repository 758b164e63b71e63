import json
import re
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.config.run import check_config, load_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, r"model\.name: is missing"),
        ({"method": "full", "adapter": {"r": 4}}, "method full trains all weights and takes no adapter keys"),
        ({"method": "pissa", "trainer": "dpo"}, "method: pissa moves weights of the base into the adapter"),
        ({"method": "adaption_prompt", "trainer": "dpo"}, "method: adaption_prompt calls the model past the losses"),
        ({"training": 3}, "training"),
        ({"data": {"train": 3}}, r"data\.train"),
        ({"data": 3}, "data"),
        ({"adapter": 3}, "adapter: should be a valid dictionary"),
        ({"model": {"name": "x", "dtype": "float99"}}, r"model\.dtype"),
        ({"method": ["lora"]}, "there is no method"),
        ({"data": {"train": [["a.csv"]]}}, r"data\.train\..*should be a valid string"),
        ({"training": {"output_dir": None}}, r"training\.output_dir: is empty"),
        ({"training": {"output_dir": ""}}, r"training\.output_dir: is empty"),
        (
            {"training": {"eval_strategy": "steps", "load_best_model_at_end": True, "save_strategy": "epoch"}},
            "training: ",
        ),
    ],
)
def test_a_block_that_is_wrong_is_told_by_its_key(change: dict[str, Any], message: str) -> None:
    config = {"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "training": {"output_dir": "run"}}
    with pytest.raises(ConfigError, match=message):
        check_config(config | change)


FIVE_MISTAKES = """\
model:
  name: base
  dtype: flot32
method: smoa
adapter:
  r: 4
  num_block: 2
data:
  train: arc_easy
  max_lenght: 100
trainer: stf
training:
  learning_rat: 1e-3
"""


def test_five_mistakes_are_reported_at_once_with_line_and_nearest_name(file: Path) -> None:
    file.write_text(FIVE_MISTAKES)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{file}: 5 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["line 3", "line 7", "line 10", "line 11", "line 13"]
    for line, name in zip(lines[1:], ["float32", "num_blocks", "max_length", "sft", "learning_rate"], strict=True):
        assert f"did you mean '{name}'?" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.max_steps=many"], r"training.max_steps: .*integer.*got 'many'"),
        (["adapter.num_blocks=0"], r"adapter: .*num_blocks"),
        (["method=melora", "adapter.partition=spectral"], r"adapter.partition: is decided by method melora"),
        (["method=smao"], "no method 'smao'; did you mean 'smoa'"),
        (
            ["data.trian=b.csv"],
            r"1 problem\n.*data\.trian: unknown key; did you mean 'train'\?$",
        ),
    ],
)
def test_a_mistake_is_told_by_its_key(overrides: list[str], message: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=.nan", "should be a finite number; got nan"),
        ("learning_rate=1e999", "should be a finite number; got inf"),
        ("learning_rate='1e-3'", "should be a valid number; got '1e-3'"),
        ("max_steps=0", "should be at least 1; got 0"),
        ("gradient_accumulation_steps=0", "should be at least 1; got 0"),
        ("seed=2020-13-45", "should be a valid integer; got '2020-13-45'"),
        ("bf16=no", "should be a valid boolean; got 'no'"),
        ("train_sampling_strategy=group_by_lenght", "there is no 'group_by_lenght'; did you mean 'group_by_length'?"),
        ("save_only_model=true", "leaves out what an interrupted run needs"),
        ("resume_from_checkpoint=true", "smoa resumes an interrupted run by itself: leave it out"),
    ],
)
def test_a_training_value_that_the_trainer_would_fail_at_or_pass_over_is_refused(
    override: str, message: str, file: Path
) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"line \d+: training\.{key}: {re.escape(message)}"):
        load_config(file, [f"training.{override}"])


@pytest.mark.parametrize(
    ("override", "value"),
    [("max_steps=-1", -1), ("save_total_limit=null", None), ("warmup_steps=0.1", 0.1), ("learning_rate=0", 0)],
)
def test_a_training_value_that_means_none_is_taken(override: str, value: float | None, file: Path) -> None:
    assert load_config(file, [f"training.{override}"]).training[override.partition("=")[0]] == value


def test_a_list_may_stand_for_a_tuple_a_block_for_a_class_and_a_float_for_a_whole_number(file: Path) -> None:
    own = {"layer_replication": [[0, 1], [0, 2]], "monteclora_config": {}, "lora_alpha": 16.0}
    load_config(file, ["method=lora", f"adapter={json.dumps(own)}"])
