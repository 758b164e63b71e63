"""The studies that `smoa compare` and `smoa tune` write, from a tiny model and chats."""

import json
import logging
from pathlib import Path

import pytest

from smoa.errors import ConfigError
from smoa_lab.config import run
from smoa_lab.config.methods import method_names
from smoa_lab.config.run import adapter_rate, check_config
from smoa_lab.study import written as module
from smoa_lab.study.study import Study, load_study
from smoa_lab.study.written import TIMES_LORA, default_study, tuning_study, write_study
from tests.support.lab import chats, rows_base, rows_config, write_rows
from tests.support.studies import WrittenRuns


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WrittenRuns:
    """A working folder with a tiny model and chats, whose sizes are those of written runs."""
    runs = WrittenRuns()
    monkeypatch.setattr(module, "inputs", runs.inputs)
    monkeypatch.chdir(tmp_path)
    rows_base(tmp_path / "base")
    write_rows(tmp_path / "chats.jsonl", chats(100))
    return runs


def written(**values: object) -> Study:
    """A study that was written and loaded."""
    return load_study(write_study(default_study("base", "chats.jsonl", **values), Path("made")))  # type: ignore[arg-type]


def test_a_first_study_has_entries_of_equal_size_and_all_that_it_decides(runs: WrittenRuns) -> None:
    runs.rows["train"] = 80
    study = written(methods=["smoa", "lora", "hira"])
    training = study.shared["training"]
    assert (training["max_steps"], training["per_device_train_batch_size"]) == (30, 8)
    assert study.shared["data"]["train"] == "chats.jsonl"
    ours, lora, hira = study.entries.values()
    assert lora.adapter == {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}
    assert ours.adapter == {"target_modules": "all-linear", "num_blocks": 4, "r": 32, "alpha": 64}
    assert hira.adapter["r"] == 8
    rate = adapter_rate(1000)
    assert [entry.learning_rate for entry in (ours, lora, hira)] == [rate, rate, 10 * rate]
    assert (study.seeds, study.planned, study.keep) == ([0, 1, 2, 3], 4, "best")
    runs.rows["train"] = 4000
    assert default_study("base", "chats.jsonl")["shared"]["training"]["max_steps"] == 300


@pytest.mark.usefixtures("runs")
def test_entries_take_what_is_set_for_them_and_the_dtype_of_machine_or_method(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (run, module):
        monkeypatch.setattr(each, "native_dtype", lambda: "bfloat16")
    settings = {"lora": {"lora_alpha": 64, "bias": "lora_only"}, "smoa": {"alpha": 7}}
    study = written(settings=settings)
    assert (study.entries["lora"].adapter["lora_alpha"], study.entries["smoa"].adapter["alpha"]) == (64, 7)
    assert [study.configs[name].model.dtype for name in ("lora", "smoa")] == ["float32", "bfloat16"]
    assert study.untouched("untouched").entry == "smoa", "by the shared dtype"


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("method", ["full", "ln_tuning"])
def test_a_method_that_cannot_have_so_many_parameters_is_refused_by_name(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"--methods: {method} can't have .* lora:8"):
        default_study("base", "chats.jsonl", ["lora", method])


@pytest.mark.usefixtures("runs")
def test_each_size_is_a_budget_and_what_can_not_have_it_is_left_out_with_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    study = written(methods=["lora", "dora", "ln_tuning"], sizes=(4, 1, 4))
    assert study.budgets() == {"r = 1": ["lora-r1"], "r = 4": ["lora-r4", "dora-r4"]}
    assert [study.entries[f"lora-r{size}"].adapter["r"] for size in (1, 4)] == [1, 4]
    left_out = [record.message.partition(":")[0] for record in caplog.records]
    assert left_out == ["dora-r1", "ln_tuning-r1", "ln_tuning-r4"]
    with pytest.raises(ConfigError, match="--sizes: no method"):
        default_study("base", "chats.jsonl", ["ln_tuning"], sizes=(1,))


def test_every_start_rate_has_its_source_and_is_of_a_method_that_there_is() -> None:
    assert set(TIMES_LORA) <= set(method_names())
    studies = Path(__file__).parents[3] / "studies"
    gone = json.loads((studies / "gone.json").read_text())
    for _, source in TIMES_LORA.values():
        place = source.partition("studies/")[2].partition(",")[0]
        known = place and ((studies / place).exists() or place in gone)
        assert known or source.startswith(module.PEFTS), source


@pytest.mark.usefixtures("runs")
def test_a_search_starts_at_the_rate_of_the_run_or_its_models_size_and_goes_by_the_loss() -> None:
    base = {"method": "lora", "adapter": {"r": 2, "target_modules": ["q_proj"]}}
    config = rows_config(Path(), Path("chats.jsonl"), Path("base"), data={"metric": "score"}, **base)
    values = tuning_study(config, max_runs=3)
    assert values["entries"]["lora"]["learning_rate"] == adapter_rate(1000)
    assert (values["seeds"], values["tuning"]["max_runs"], values["shared"]["data"]["metric"]) == ([], 3, None)
    own = check_config({**config.model_dump(), "training": {**config.training, "learning_rate": 0.5, "seed": 3}})
    values = tuning_study(own, max_runs=6)
    assert (values["entries"]["lora"]["learning_rate"], values["tuning"]["seed"]) == (0.5, 3)
    assert {"learning_rate", "seed", "output_dir"}.isdisjoint(values["shared"]["training"])
