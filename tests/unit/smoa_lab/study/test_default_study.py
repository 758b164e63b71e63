"""The studies that commands write."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from smoa.errors import ConfigError
from smoa_lab.cli.main import app
from smoa_lab.config import run
from smoa_lab.config.methods import method_names
from smoa_lab.config.run import RunConfig, adapter_rate, check_config, load_config
from smoa_lab.study import default_study as module
from smoa_lab.study.default_study import TIMES_LORA, default_study, tuning_study
from smoa_lab.study.study import Study, load_study
from tests.support.own_rows import chats, rows_base, write_rows
from tests.support.studies import WrittenRuns


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: WrittenRuns) -> Path:
    """A working folder with a tiny model and chats."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "inputs", written.inputs)
    monkeypatch.chdir(tmp_path)
    written.parameters = 7424  # of LoRA with r = 8
    rows_base(tmp_path / "base")
    write_rows(tmp_path / "chats.jsonl", chats(100))
    return tmp_path


def smoa(*words: str, code: int = 0) -> Any:
    ran = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert ran.exit_code == code, ran.output
    return ran


def test_a_first_study_has_entries_of_equal_size_and_all_that_it_decides(room: Path, written: WrittenRuns) -> None:
    written.rows["train"] = 80
    study = default_study("base", "chats.jsonl", ["smoa", "lora", "hira"])
    assert study.folder == Path("studies/chats")
    training = study.shared["training"]
    assert (training["max_steps"], training["per_device_train_batch_size"]) == (30, 8)
    assert study.shared["data"]["train"] == "chats.jsonl"
    ours, lora, hira = study.entries.values()
    assert lora.adapter == {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}
    assert ours.adapter == {"target_modules": "all-linear", "num_blocks": 4, "r": 32, "alpha": 64}
    assert lora.parameters is not None
    for other in (ours, hira):
        assert 0.85 <= (other.parameters or 0) / lora.parameters <= 1.02
    rate = adapter_rate(1000)
    assert [entry.learning_rate for entry in (ours, lora, hira)] == [rate, rate, 10 * rate]
    assert (study.seeds, study.keep) == ([0, 1, 2, 3], "best")
    written.rows["train"] = 4000
    assert default_study("base", "chats.jsonl").shared["training"]["max_steps"] == 300


def test_entries_have_the_dtype_of_the_machine_as_a_run_without_a_file(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (run, module):
        monkeypatch.setattr(each, "native_dtype", lambda: "bfloat16")
    study = default_study("base", "chats.jsonl")
    assert {study.config(name).model.dtype for name in study.entries} == {"bfloat16"}


def test_entries_take_what_is_set_for_them_and_the_dtype_of_their_method(room: Path) -> None:
    settings = {"lora": {"lora_alpha": 64, "bias": "lora_only"}, "smoa": {"alpha": 7}}
    study = default_study("base", "chats.jsonl", changes=["shared.model.dtype=bfloat16"], settings=settings)
    assert (study.entries["lora"].adapter["lora_alpha"], study.entries["smoa"].adapter["alpha"]) == (64, 7)
    assert [study.config(name).model.dtype for name in ("lora", "smoa")] == ["float32", "bfloat16"]
    assert study.untouched("untouched").entry == "smoa", "by the shared dtype"


@pytest.mark.parametrize("method", ["full", "ln_tuning"])
def test_a_method_that_cannot_have_so_many_parameters_is_refused_by_name(method: str, room: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--methods: {method} can't have the [0-9,]+ parameters of lora:8 \("):
        default_study("base", "chats.jsonl", ["lora", method])


def test_every_start_rate_has_its_source_and_is_of_a_method_that_there_is() -> None:
    assert set(TIMES_LORA) <= set(method_names())
    for _, source in TIMES_LORA.values():
        place = source.partition("studies/")[2].partition(",")[0]
        known = place and (Path(__file__).parents[4] / "studies" / place).exists()
        assert known or source.startswith(module.PEFTS), source


def test_the_command_writes_a_study_runs_it_and_goes_on_with_it(room: Path, written: WrittenRuns) -> None:
    words = ["compare", "--model", "base", "--data", "chats.jsonl"]
    ran = smoa(*words)
    assert (
        "lora keeps at least 94 % of what smoa gained, after round 2 of 5: take lora, the first in order" in ran.stdout
    )
    assert "of cost: studies/chats/lora/lr-" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "Page, table and runs: studies/chats"
    assert "a final run" in ran.stderr
    assert "150 steps a run on 400 rows" in ran.stderr
    file, number = room / "studies" / "chats" / "study.yaml", len(written.ran)
    for again in (words, ["compare", str(file)], ["compare", str(file), "--report-only"]):
        assert smoa(*again).stdout == ran.stdout
    assert len(written.ran) == number
    other = smoa("compare", "--model", "base", "--data", "chats.jsonl", "--parameters", "lora:4", code=1)
    assert "studies/chats/study.yaml: says otherwise" in other.stderr
    assert "use a new folder (folder=studies/NAME)" in other.stderr
    smoa("compare", "--model", "base", "--data", "chats.jsonl", "--seeds", "2", "folder=studies/two", "--json")
    assert len(list((room / "studies" / "two").glob("*/lr-*-seed-?"))) == 4
    smoa("compare", "--model", "base", "--data", "chats.jsonl", "--seeds", "3", "folder=studies/two")
    smoa("compare", "studies/two/study.yaml", "--seeds", "7")
    assert {path.name[-1] for path in (room / "studies" / "two").glob("*/lr-*-seed-?")} == set("0123456")
    smoa("compare", "studies/two/study.yaml")


def test_an_interrupted_first_start_leaves_a_file_to_edit(room: Path, written: WrittenRuns) -> None:
    def interrupted(config: RunConfig) -> None:
        raise KeyboardInterrupt

    written.loss = interrupted
    smoa("compare", "--model", "base", "--data", "chats.jsonl", code=130)
    assert list(yaml.safe_load((room / "studies" / "chats" / "study.yaml").read_text())["entries"]) == ["lora", "smoa"]


def test_a_study_that_is_refused_leaves_no_file_that_refuses_the_next(room: Path, written: WrittenRuns) -> None:
    words = ["compare", "--model", "base", "--data", "chats.jsonl"]
    assert "the smallest comparison, take" in smoa(*words, "--minutes", "0.01", code=1).stderr
    first = smoa(*words, "--seeds", "2").stdout
    assert "tuning.seed: 100, now 7" in smoa(*words, "--methods", "smoa,dora", "tuning.seed=7", code=1).stderr
    assert smoa(*words).stdout == first


def test_a_plan_alone_times_steps_says_what_it_will_tell_and_keeps_nothing(room: Path, written: WrittenRuns) -> None:
    words = ["compare", "--model", "base", "--data", "chats.jsonl", "--plan"]
    told = smoa(*words).stdout
    assert "150 steps a run on 400 rows" in told
    assert re.search(r"By 5 rounds it will tell differences of about 0\.\d{3} nats per token\.", told)
    assert (written.ran, len(written.timed)) == ([], 2)
    assert not (room / "studies").exists() or not list((room / "studies").iterdir())
    assert "By 3 rounds it will tell" in smoa(*words, "--minutes", "3").stdout
    assert "--plan is of all entries" in smoa(*words, "--only", "lora", code=1).stderr
    planned = json.loads(smoa(*words, "--json").stdout)
    assert (planned["steps"], planned["outlook"][:11]) == (150, "By 5 rounds")
    written.rows["test"] = 0
    assert "shared.data: leaves no test rows" in smoa(*words, code=1).stderr


def test_the_folder_of_a_study_names_it(room: Path, written: WrittenRuns) -> None:
    first = smoa("compare", "--model", "base", "--data", "chats.jsonl", "--seeds", "2").stdout
    (room / "chats.jsonl").unlink()  # a report needs no rows
    assert first.endswith(smoa("compare", "studies/chats", "--report-only").stdout)


def test_the_same_command_keeps_what_was_edited_and_refuses_another_study(room: Path, written: WrittenRuns) -> None:
    words, file = ["compare", "--model", "base", "--data", "chats.jsonl"], room / "studies" / "chats" / "study.yaml"
    smoa(*words, "--seeds", "2")
    values = yaml.safe_load(file.read_text()) | {"keep": "all", "tolerance": 0.2}
    del values["entries"]["lora"]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert "lora" not in smoa("compare", "studies/chats").stderr  # neither in the plan's table
    smoa(*words, "--methods", "smoa")
    kept = yaml.safe_load(file.read_text())
    assert (kept["keep"], kept["tolerance"], [*kept["entries"]]) == ("all", 0.2, ["smoa"])
    before = file.read_bytes()
    for other in (["--methods", "dora"], ["--sizes", "1,4"]):
        assert "entries: smoa, now " in smoa(*words, *other, code=1).stderr
        assert file.read_bytes() == before


def test_the_first_command_given_again_takes_nothing_out_of_the_file(room: Path, written: WrittenRuns) -> None:
    words, file = ["compare", "--model", "base", "--data", "chats.jsonl"], room / "studies" / "chats" / "study.yaml"
    smoa(*words, "--seeds", "2")
    file.write_text("# Mine.\n" + file.read_text())
    smoa(*words)
    assert file.read_text().startswith("# Mine.\n"), "it says the same"
    values = yaml.safe_load(file.read_text())
    values["entries"]["second"] = values["entries"]["lora"]
    file.write_text(edited := "# Mine.\n" + yaml.safe_dump(values, sort_keys=False))
    for more in ([], ["--report-only"], ["--plan"]):
        told = smoa(*words, *more, code=1).stderr
        assert "studies/chats/study.yaml: has second too, which this command would take out; run smoa compare" in told
        assert file.read_text() == edited
    assert "\nsecond " in smoa("compare", "studies/chats").stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--report-only"], "nothing has run yet"),
        (["--only", "nobody"], "--only: nobody is neither an entry (lora, smoa) nor a budget (all)"),
        (["--ray-address", "x"], "--ray-address x: does not answer"),
        (["--methods", "smoa,nobody"], "there is no method 'nobody'"),
        (["--set", "lora.r=3"], "--set lora.r: the number of parameters decides it; leave it out"),
        (["--report-only", "--seeds", "2"], "--report-only runs nothing: leave out --only, --plan, --seeds and"),
        (["--report-only", "--minutes", "2"], "--report-only runs nothing"),
        (["--report-only", "--plan"], "--report-only runs nothing"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(
    words: list[str], told: str, room: Path, written: WrittenRuns
) -> None:
    assert told in smoa("compare", "--model", "base", "--data", "chats.jsonl", *words, code=1).stderr
    assert written.ran == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--model", "base"],
        ["study.yaml", "--model", "base", "--data", "x"],
        ["study.yaml", "--methods", "smoa,hira"],
        ["study.yaml", "--parameters", "lora:64"],
    ],
)
def test_a_comparison_is_of_a_file_or_of_a_model_and_data(words: list[str], room: Path) -> None:
    assert "give the YAML file of a study, or both --model and --data" in smoa("compare", *words, code=1).stderr


def run_file(room: Path, **training: Any) -> Path:
    values = {
        "model": {"name": "base"},
        "method": "lora",
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"train": "chats.jsonl"},
        "training": {"output_dir": "runs/own", "max_steps": 30, "seed": 3, "use_cpu": True, **training},
    }
    (room / "own.yaml").write_text(yaml.safe_dump(values))
    return room / "own.yaml"


def test_a_study_by_a_users_metric_is_reported_without_it_and_goes_on_with_it(room: Path) -> None:
    (room / "own.py").write_text("def score(answer, row): return float(answer == '4')")
    words = ["compare", "--model", "base", "--data", "chats.jsonl", "seeds=[0,1]"]
    first = smoa(*words, "--metric", "own.py:score").stdout
    assert "smoa gained at least 49 % more than lora" in first
    assert first.endswith(smoa(*words, "--report-only").stdout)
    assert "only the command names: give --metric own.py:score" in smoa(*words, code=1).stderr


def test_a_metric_at_an_absolute_path_is_printed_as_it_was_given_and_written_without_folders(room: Path) -> None:
    (room / "own.py").write_text("def score(answer, row): return float(answer == '4')")
    metric = f"{room / 'own.py'}:score"
    words = ["compare", "--model", "base", "--data", "chats.jsonl", "seeds=[0]", "--metric", metric]
    assert f"`smoa compare studies/chats/study.yaml --metric {metric} --seeds 3` goes on" in smoa(*words).stdout
    assert "--metric own.py:score --seeds 3`" in (room / "studies" / "chats" / "README.md").read_text()


def test_tune_is_a_study_of_one_entry_without_final_runs(room: Path, written: WrittenRuns) -> None:
    file = run_file(room, learning_rate=0.0017)
    ran = smoa("tune", str(file))
    assert [line.split()[0] for line in ran.stdout.splitlines()[1:4]] == ["9.6e-4", "1.7e-3", "3e-3"]
    assert ran.stdout.splitlines()[-1] == "  learning_rate: 1.9e-3"
    assert "1.9e-3 is the vertex of the parabola through the best and its neighbors; the adapter" in ran.stdout
    assert "that is kept was trained at 1.7e-3." in ran.stdout
    folder = room / "runs" / "own-tuning"
    assert [path.parent.name for path in folder.glob("lora/*/adapter")] == ["lr-1.7e-3-seed-3"]
    number = len(written.ran)
    assert '"interior": true' in smoa("tune", str(file), "--json").stdout
    assert len(written.ran) == number


def test_tune_says_what_to_change_where_its_folder_has_another_search(room: Path) -> None:
    file = str(run_file(room))
    smoa("tune", file)
    told = smoa("tune", file, "training.max_steps=40", code=1).stderr
    assert "shared.training.max_steps: 30, now 40" in told
    assert "or for smoa tune another training.output_dir" in told
    smoa("tune", file, "training.max_steps=40", "training.output_dir=runs/other")


def test_tune_starts_at_the_rate_of_the_models_size_and_tries_as_many_as_it_may(
    room: Path, written: WrittenRuns
) -> None:
    study: Study = tuning_study(check_config(yaml.safe_load(run_file(room).read_text())), max_runs=3)
    assert study.entries["lora"].learning_rate == adapter_rate(1000)
    assert study.seeds == []
    smoa("tune", str(run_file(room)), "--max-runs", "3")
    assert len(list((room / "runs" / "own-tuning").glob("lora/lr-*"))) == 3
    assert load_study(room / "runs" / "own-tuning" / "study.yaml").tuning.max_runs == 3


def test_a_search_goes_by_the_loss_whatever_the_runs_metric(room: Path, written: WrittenRuns) -> None:
    file = run_file(room)
    file.write_text(file.read_text().replace("train: chats.jsonl", "train: chats.jsonl\n  metric: score"))
    assert tuning_study(load_config(file), max_runs=3).shared["data"]["metric"] is None
    assert "learning_rate: " in smoa("tune", str(file), "--max-runs", "3").stdout


def test_tune_recommends_no_rate_where_all_diverged(room: Path, written: WrittenRuns) -> None:
    written.loss = lambda config: None
    told = smoa("tune", str(run_file(room)), "--max-runs", "3", code=1).stderr
    assert "every rate down to" in told
    assert "diverged; start from a much lower one" in told


def test_a_search_that_ends_at_its_edge_says_to_go_on_from_there(room: Path, written: WrittenRuns) -> None:
    written.loss = lambda config: -float(config.training["learning_rate"])
    told = smoa("tune", str(run_file(room))).stdout
    assert "The best lies at the boundary of the range that was tried: search on with a higher --max-runs." in told
    smoa("tune", str(run_file(room)), "--max-runs", "8")
    assert len(list((room / "runs" / "own-tuning").glob("lora/lr-*"))) == 8
