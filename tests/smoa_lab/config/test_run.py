import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from trl import SFTConfig

from smoa import ConfigError, SmoaConfig
from smoa_lab.config.methods import find_method, method_names
from smoa_lab.config.run import ModelSection, adapter_rate, check_config, load_config, native_dtype
from smoa_lab.config.yaml_text import apply_overrides
from smoa_lab.data.prepared import Sizes
from smoa_lab.data.sources import FileSource, HubRows, HubSource

CONFIGS = Path(__file__).parents[3] / "configs"
SIZES = {"gemma3-270m": 268_098_176, "smollm2-135m": 134_515_008}
"""Parameters of the packaged models."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_ready_config_is_valid_and_with_the_default_scale_has_the_settings_that_init_proposes(path: Path) -> None:
    # Without use_cpu a config for a GPU is refused where there is none, as it should be.
    config = load_config(path, ["training.use_cpu=true"])
    if "scale" not in config.adapter:
        part = 0.5 if path.stem == "demo" else 1  # as its comment says
        assert config.training["learning_rate"] == part * adapter_rate(SIZES[config.model.name])
        assert (config.adapter["num_blocks"], config.adapter["alpha"]) == (4, 2 * config.adapter["r"])


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [(22e6, 2e-3), (3e8, 2e-3), (5e8, 7.5e-4), (math.sqrt(3e17), 6.3e-4), (1e9, 2e-4), (7e10, 2e-4)],
)
def test_the_learning_rate_falls_with_the_models_size(parameters: float, rate: float) -> None:
    assert adapter_rate(int(parameters)) == rate


def test_a_model_is_loaded_in_what_the_machine_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelSection(name="base").dtype == native_dtype()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: True)
    assert ModelSection(name="base").dtype == "bfloat16"
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: False)
    assert ModelSection(name="base").dtype == "float32"


@pytest.mark.parametrize("key", ["trust_remote_code", "allow_all_kernels"])
def test_a_file_or_an_override_cannot_let_a_repository_run_its_code(file: Path, key: str) -> None:
    refused = rf"model\.options: {key}.*--trust-remote-code"
    with pytest.raises(ConfigError, match=refused):
        load_config(file, [f"model.options.{key}=true"])
    file.write_text(file.read_text().replace("{name: base}", f"{{name: base, options: {{{key}: yes}}}}"))
    with pytest.raises(ConfigError, match=refused):
        load_config(file)


def test_a_file_or_an_override_cannot_name_a_function_to_run(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.metric: .*own\.py:score"):
        load_config(file, ["data.metric=own.py:score"])
    assert load_config(file, ["data.metric=score"]).data.metric == "score"
    assert "metric: null" in load_config(file, ["data.metric=score"]).to_yaml()  # what other commands read


def problems(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, list(overrides))
    return str(caught.value)


def test_rows_come_from_one_or_more_places(file: Path) -> None:
    def sources(*changes: str) -> Any:
        return load_config(file, list(changes)).data.sources()

    rows = FileSource(Path("rows.jsonl"), "rows.jsonl")
    assert sources() == ([rows], [])
    own = FileSource(Path("own.csv"), "own.csv")
    assert sources("data.test=own.csv") == ([rows], [own])
    several, tested = sources("data.train=[rows.jsonl, boolq, piqa]")
    assert [source.name for source in several] == ["rows.jsonl", "google/boolq (train)", "baber/piqa (train)"]
    assert [source.name for source in tested] == ["google/boolq (validation)", "baber/piqa (validation)"]
    assert sources("data.train=[boolq]", "data.test=own.csv")[1] == [own]
    hub = ("data.train=null", "data.hub={name: a/b, test_split: test}")
    assert sources(*hub)[1] != sources(*hub, "data.test=own.csv")[1] == [own]
    hub = HubRows(name="owner/rows", test_split="dev")
    assert sources("data.train=null", "data.hub={name: owner/rows, test_split: dev}") == (
        [HubSource(hub, "train")],
        [HubSource(hub, "dev")],
    )
    for changes in (["data.hub={name: owner/rows}"], ["data.train=null"], ["data.train=[]"]):
        said = "give either train, a file, a folder or a name, or hub, a data set of the Hub"
        assert said in problems(file, *changes)


def test_the_sizes_of_the_parts_are_the_datas(file: Path) -> None:
    assert load_config(file).data.sizes == Sizes(None, 200, 400)
    changed = load_config(file, ["data.train_examples=3", "data.validation_examples=0", "data.test_examples=5"])
    assert changed.data.sizes == Sizes(3, 0, 5)


def test_a_saved_config_is_read_as_the_same_run(file: Path) -> None:
    changes = ["early_stopping=2", "training.eval_strategy=epoch", "scoring={part: validation, before: false}"]
    config = load_config(file, changes)
    file.write_text(config.to_yaml())
    assert load_config(file) == config


def test_numbers_are_within_bounds(file: Path) -> None:
    for change in ("samples=-1", "train_examples=0", "test_examples=-1", "max_length=7", "choices=number"):
        assert f"data.{change.partition('=')[0]}: " in problems(file, f"data.{change}")
    for value in ("0", "1.5"):
        assert "early_stopping: " in problems(file, f"early_stopping={value}", "training.eval_strategy=epoch")
    assert "scoring.part: " in problems(file, "scoring.part=train")
    assert "training.packing: " in problems(file, "training.packing=7")
    assert "training: " in problems(file, "training=7")


def test_a_key_that_the_trainer_lacks_is_named_with_the_nearest(file: Path) -> None:
    assert "training.max_lenght: unknown key; did you mean 'max_length'?" in problems(file, "training.max_lenght=3")
    assert "trainer: " in problems(file, "trainer=dpo")


@pytest.mark.parametrize(("key", "own"), [("max_length", "max_length"), ("chat_template_path", "template")])
def test_a_key_of_trl_by_which_tokens_are_made_leads_to_the_datas(key: str, own: str, file: Path) -> None:
    assert f"training.{key}: name it as data.{own}" in problems(file, f"training.{key}=64")


def test_tokens_that_are_cut_and_labeled_are_left_to_the_trainer_as_they_are(file: Path) -> None:
    for changes, length in (([], None), (["training.packing=true", "data.max_length=64"], 64)):
        found = load_config(file, ["training.use_cpu=true", "training.assistant_only_loss=true", *changes]).arguments()
        assert isinstance(found, SFTConfig)
        assert (found.assistant_only_loss, found.max_length) == (False, length)


def stopping(**training: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model": {"name": "base"}, "data": {"train": "rows.jsonl"}, "training": training}
    return check_config(values | {"early_stopping": 3, "method": "full"}).training


def test_early_stopping_keeps_a_checkpoint_of_each_evaluation() -> None:
    found = stopping(eval_strategy="steps", eval_steps=7)
    assert found["load_best_model_at_end"] is True
    assert (found["save_strategy"], found["save_steps"]) == ("steps", 7)
    assert stopping(eval_strategy="epoch")["save_strategy"] == "epoch"
    assert "save_steps" not in stopping(eval_strategy="epoch")
    assert stopping(eval_strategy="steps", eval_steps=2, save_steps=4)["save_steps"] == 4


def test_early_stopping_needs_validation() -> None:
    with pytest.raises(ConfigError, match="early_stopping: needs the loss on validation rows; set training"):
        stopping()


@pytest.mark.parametrize(
    ("override", "message"),
    [("training", "key.key=value"), ("=3", "key.key=value"), ("model.name.first=3", "name is not a block of keys")],
)
def test_an_override_that_goes_nowhere_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"model": {"name": "base"}}, [override])


def test_numbers_in_exponent_notation_are_numbers_and_no_is_a_word(file: Path) -> None:
    training = load_config(file, ["training.eval_strategy=no", "training.bf16=false"]).training
    assert (training["learning_rate"], training["eval_strategy"], training["bf16"]) == (0.01, "no", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1"),
        ("- 1", r"run\.yaml: must contain blocks"),
        ("", "must contain blocks"),
        ("model: 1\nmodel: 2", 'line 2: found duplicate key "model"'),
    ],
)
def test_text_that_is_no_config_is_refused_with_its_place(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_what_is_not_yaml_is_a_text_in_an_override() -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, ["a.b=[1, 2]", "a.c=[1", "a.d=1e-3"])
    assert values == {"a": {"b": [1, 2], "c": "[1", "d": 0.001}}


def test_a_method_of_peft_is_found_by_its_name_in_any_case() -> None:
    assert find_method("IA3").config_class is IA3Config
    assert find_method("DoRA") is find_method("dora")
    assert (find_method("waveft").budget_key, find_method("lora").budget_key) == ("n_frequency", "r")
    assert find_method("ia3").budget_key is find_method("full").budget_key is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smao", r"method: .*'smao'; did you mean 'smoa'\?"),
        ("???", r"method: .*'\?\?\?'; smoa budget .* lists them"),
        ("prompt_tuning", "method: prompt_tuning trains virtual tokens before the text.*choose another"),
        ("poly", "method: poly chooses among its parameters by task ids"),
    ],
)
def test_a_method_that_no_run_can_train_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_method(name)
    assert name not in method_names()


def test_a_preset_wins_over_the_block_and_the_block_over_the_task_type() -> None:
    config = find_method("melora").peft_config({"partition": "spectral", "task_type": "SEQ_CLS"})
    assert isinstance(config, SmoaConfig)
    assert (config.partition, config.modulation, config.task_type) == ("contiguous", "none", "SEQ_CLS")


# mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, r"model\.name: .*required"),
        ({"method": "full", "adapter": {"r": 4}}, "method: full trains all weights; leave adapter out"),
        ({"training": 3}, "training"),
        ({"data": {"train": 3}}, r"data\.train"),
        ({"data": 3}, "data"),
        ({"adapter": 3}, "adapter: .*valid dictionary; got 3"),
        ({"model": {"name": "x", "dtype": "float99"}}, r"model\.dtype"),
        ({"method": ["lora"]}, "there is no method"),
        ({"data": {"train": [["a.csv"]]}}, r"data\.train: .*valid string"),
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


def test_five_mistakes_are_reported_at_once_with_key_and_nearest_name(file: Path) -> None:
    file.write_text(FIVE_MISTAKES)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{file}: 5 problems"
    keys = ["model.dtype", "trainer", "data.max_lenght", "adapter.num_block", "training.learning_rat"]
    assert [line.split(":")[0].strip() for line in lines[1:]] == keys
    for line, name in zip(lines[1:], ["float32", "sft", "max_length", "num_blocks", "learning_rate"], strict=True):
        assert f"'{name}'" in line
        assert ("did you mean" in line) == (name not in ("float32", "sft"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.max_steps=many"], r"training.max_steps: .*integer.*got 'many'"),
        (["adapter.num_blocks=0"], r"adapter: .*num_blocks"),
        (["method=melora", "adapter.partition=spectral"], r"adapter.partition: is decided by method melora"),
    ],
)
def test_a_mistake_is_told_by_its_key(overrides: list[str], message: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=.nan", "nan"),
        ("learning_rate=1e999", "inf"),
        ("max_steps=many", "'many'"),
        ("seed=2020-13-45", "'2020-13-45'"),
        ("bf16=maybe", "'maybe'"),
    ],
)
def test_a_training_value_that_the_trainer_would_fail_at_or_pass_over_is_refused(
    override: str, message: str, file: Path
) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"training\.{key}: .*got {re.escape(message)}"):
        load_config(file, [f"training.{override}"])


@pytest.mark.parametrize(
    ("override", "value"),
    [("max_steps=-1", -1), ("save_total_limit=null", None), ("warmup_steps=0.1", 0.1), ("learning_rate=0", 0)],
)
def test_a_training_value_that_means_none_is_taken(override: str, value: float | None, file: Path) -> None:
    assert load_config(file, [f"training.{override}"]).training[override.partition("=")[0]] == value


def test_a_value_is_read_as_the_trainer_has_it(file: Path) -> None:
    training = load_config(file, ["training.bf16=no", "training.learning_rate='1e-3'"]).training
    assert training["bf16"] is False
    assert training["learning_rate"] == 1e-3


def test_a_list_may_stand_for_a_tuple_a_block_for_a_class_and_a_float_for_a_whole_number(file: Path) -> None:
    own = {"layer_replication": [[0, 1], [0, 2]], "monteclora_config": {}, "lora_alpha": 16.0}
    load_config(file, ["method=lora", f"adapter={json.dumps(own)}"])
