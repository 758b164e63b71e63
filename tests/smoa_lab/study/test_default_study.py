"""The studies that commands write, and what they change in one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from smoa.errors import ConfigError, DataError
from smoa_lab.cli.main import app
from smoa_lab.config import run
from smoa_lab.config.methods import method_names
from smoa_lab.config.run import RunConfig, adapter_rate, check_config, load_config
from smoa_lab.study import default_study as module
from smoa_lab.study.asked import ask, check, write_study
from smoa_lab.study.default_study import TIMES_LORA, default_study, tuning_study
from smoa_lab.study.study import Study, edit, load_study
from tests.support.own_rows import chats, rows_base, write_rows
from tests.support.studies import WrittenRuns, finished, tiny_study

pytestmark = pytest.mark.usefixtures("quick_pictures")
NEW = ("compare", "--model", "base", "--data", "chats.jsonl")


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


def a_study(folder: str = "made", **values: Any) -> Study:
    """Written and loaded."""
    return load_study(write_study(default_study("base", "chats.jsonl", **values), Path(folder)))


def test_a_first_study_has_entries_of_equal_size_and_all_that_it_decides(room: Path, written: WrittenRuns) -> None:
    written.rows["train"] = 80
    study = a_study(methods=["smoa", "lora", "hira"])
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
    written.rows["train"] = 4000
    assert default_study("base", "chats.jsonl")["shared"]["training"]["max_steps"] == 300


def test_entries_have_the_dtype_of_the_machine_as_a_run_without_a_file(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (run, module):
        monkeypatch.setattr(each, "native_dtype", lambda: "bfloat16")
    assert {config.model.dtype for config in a_study().configs.values()} == {"bfloat16"}


def test_entries_take_what_is_set_for_them_and_the_dtype_of_their_method(room: Path) -> None:
    settings = {"lora": {"lora_alpha": 64, "bias": "lora_only"}, "smoa": {"alpha": 7}}
    study = a_study(changes=["shared.model.dtype=bfloat16"], settings=settings)
    assert (study.entries["lora"].adapter["lora_alpha"], study.entries["smoa"].adapter["alpha"]) == (64, 7)
    assert [study.configs[name].model.dtype for name in ("lora", "smoa")] == ["float32", "bfloat16"]
    assert study.untouched("untouched").entry == "smoa", "by the shared dtype"


@pytest.mark.parametrize("method", ["full", "ln_tuning"])
def test_a_method_that_cannot_have_so_many_parameters_is_refused_by_name(method: str, room: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--methods: {method} can't have the [0-9,]+ parameters of lora:8 \("):
        default_study("base", "chats.jsonl", ["lora", method])


def test_each_size_is_a_budget_and_what_can_not_have_it_is_left_out_with_a_word(
    room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = a_study(methods=["lora", "dora", "ln_tuning"], sizes=(4, 1, 4))
    assert study.budgets() == {"r = 1": ["lora-r1"], "r = 4": ["lora-r4", "dora-r4"]}
    assert [study.entries[f"lora-r{size}"].adapter["r"] for size in (1, 4)] == [1, 4]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "dora-r1",
        "ln_tuning-r1",
        "ln_tuning-r4",
    ]
    with pytest.raises(ConfigError, match="--sizes: no method"):
        default_study("base", "chats.jsonl", ["ln_tuning"], sizes=(1,))
    with pytest.raises(ConfigError, match="--sizes and --parameters"):
        default_study("base", "chats.jsonl", parameters="lora:8", sizes=(1,))


def test_every_start_rate_has_its_source_and_is_of_a_method_that_there_is() -> None:
    assert set(TIMES_LORA) <= set(method_names())
    for _, source in TIMES_LORA.values():
        place = source.partition("studies/")[2].partition(",")[0]
        known = place and (Path(__file__).parents[3] / "studies" / place).exists()
        assert known or source.startswith(module.PEFTS), source


# the commands


def test_the_command_writes_a_study_runs_it_and_goes_on_with_it(room: Path, written: WrittenRuns) -> None:
    ran = smoa(*NEW)
    assert "lora keeps at least 94 % of what smoa gained, after round 2 of 5: take lora" in ran.stdout
    assert "studies/chats/lora/lr-" in ran.stdout
    assert ran.stdout.splitlines()[-1].endswith(": studies/chats")
    assert "at most" in ran.stderr, "how long the rest takes"
    file, number = room / "studies" / "chats" / "study.yaml", len(written.ran)
    for again in (NEW, ("compare", str(file.parent)), ("compare", str(file), "--report-only")):
        assert smoa(*again).stdout.splitlines()[0].split(": ")[0] == ran.stdout.splitlines()[0].split(": ")[0]
    assert len(written.ran) == number
    summary = json.loads(smoa("compare", "studies/chats", "--report-only", "--json").stdout)
    assert summary["budgets"]["all"]["take"] == "lora"


def test_a_study_may_be_written_into_a_folder_of_its_own_and_get_more_seeds(room: Path, written: WrittenRuns) -> None:
    smoa("compare", "studies/two", *NEW[1:], "--seeds", "2")
    study = load_study(room / "studies" / "two" / "study.yaml")
    assert (study.seeds, study.rounds) == ([0, 1], None)
    smoa("compare", "studies/two", "--seeds", "4")
    study = load_study(room / "studies" / "two" / "study.yaml")
    assert (study.seeds, study.planned) == ([0, 1, 2, 3], 2), "a look at round 2 was reported"


def test_an_interrupted_first_start_leaves_a_file_to_edit(room: Path, written: WrittenRuns) -> None:
    def interrupted(config: RunConfig) -> None:
        raise KeyboardInterrupt

    written.loss = interrupted
    smoa(*NEW, code=130)
    assert list(load_study(room / "studies" / "chats" / "study.yaml").entries) == ["lora", "smoa"]


def test_a_study_that_is_refused_leaves_no_file(room: Path) -> None:
    smoa(*NEW, "tuning.max_runs=1", code=1)
    assert not list((room / "studies").rglob("study.yaml"))


def test_a_report_needs_no_rows(room: Path, written: WrittenRuns) -> None:
    smoa(*NEW, "--seeds", "2")
    (room / "chats.jsonl").unlink()
    smoa("compare", "studies/chats", "--report-only")


def test_the_same_command_keeps_what_was_edited_adds_entries_and_refuses_another_study(
    room: Path, written: WrittenRuns
) -> None:
    file = room / "studies" / "chats" / "study.yaml"
    smoa(*NEW, "--seeds", "2")
    file.write_text("# Mine.\n" + file.read_text())
    edit(file, ["keep=all", "tolerance=0.2"])
    smoa(*NEW, "--methods", "smoa")
    smoa(*NEW, "--methods", "dora")
    study = load_study(file)
    assert (study.keep, study.tolerance, [*study.entries]) == ("all", 0.2, ["lora", "smoa", "dora"])
    assert file.read_text().startswith("# Mine.\n")
    before = file.read_bytes()
    assert "another entries.lora.adapter" in smoa(*NEW, "--parameters", "lora:4", code=1).stderr
    other = smoa("compare", "studies/chats", "--model", "base", "--data", "other.jsonl", code=1).stderr
    assert "other.jsonl" in other
    assert file.read_bytes() == before


def test_sizes_have_a_verdict_each_and_one_picture_and_err_by_themselves(room: Path, written: WrittenRuns) -> None:
    told = smoa(*NEW, "--seeds", "2", "--sizes", "1,4").stdout
    assert told.count("Budget: r = ") == 2
    assert [line.split(":")[0] for line in told.splitlines() if line.startswith("r = ")] == ["r = 1", "r = 4"]
    folder = room / "studies" / "chats"
    assert (folder / "sizes.png").exists()
    assert "errs by itself" in (folder / "README.md").read_text()
    more = smoa(*NEW, "--sizes", "1,2,4").stdout
    assert more.count("Budget: r = ") == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "nobody"], "--only: nobody is neither an entry (lora, smoa) nor a budget (all)"),
        (["--methods", "smoa,nobody"], "there is no method 'nobody'"),
        (["--set", "lora.r=3"], "lora can't have the"),
        (["--sizes", "1,two"], "--sizes: 'two' is no rank of LoRA"),
        (["--set", "dora.lora_alpha=3"], "--set dora: is not one of --methods lora,smoa"),
        (["--sizes", "1,4", "--parameters", "lora:8"], "--sizes and --parameters"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(
    words: list[str], told: str, room: Path, written: WrittenRuns
) -> None:
    assert told in smoa(*NEW, *words, code=1).stderr
    assert written.ran == []


@pytest.mark.parametrize("words", [[], ["--model", "base"], ["x", "--methods", "smoa,hira"], ["x", "--sizes", "1"]])
def test_a_comparison_is_of_a_file_or_of_a_model_and_data(words: list[str], room: Path) -> None:
    assert "give a study, or both --model and --data" in smoa("compare", *words, code=1).stderr


def test_a_study_without_rows_in_a_part_is_refused_before_any_run(room: Path, written: WrittenRuns) -> None:
    written.rows["test"] = 0
    assert "leaves no test rows" in smoa(*NEW, code=1).stderr
    assert written.ran == []


def test_minutes_fit_a_new_study_and_end_one_that_has_runs(room: Path, written: WrittenRuns) -> None:
    smoa(*NEW, "--minutes", "60")
    study = load_study(room / "studies" / "chats" / "study.yaml")
    assert len(written.timed) == 2
    assert study.shared["training"]["max_steps"] <= 300
    smoa(*NEW, "--minutes", "60")
    assert len(written.timed) == 2, "its steps are fixed"


# what a command writes into a file


def test_more_seeds_before_a_look_are_planned_and_after_one_are_not(tmp_path: Path, written: WrittenRuns) -> None:
    file = tiny_study(tmp_path)
    assert (ask(file, [], 2).seeds, load_study(file).planned) == ([0, 1], 2)
    assert ask(file, [], 3).planned == 3
    finished(file)
    after = ask(file, ["tolerance=0.2"], 5)
    assert (after.seeds, after.planned, after.tolerance) == ([0, 1, 2, 3, 4], 3, 0.2)
    assert ask(file, [], 2).seeds == [0, 1, 2, 3, 4], "what was asked for stays"


def test_an_entry_that_came_after_a_look_takes_an_unplanned_one_and_the_next_a_further(
    tmp_path: Path, written: WrittenRuns
) -> None:
    file, entry = tiny_study(tmp_path), {"method": "lora", "learning_rate": 0.002}
    finished(file)
    edit(file, [f"entries.late={json.dumps(entry | {'budget': 'small'})}", f"entries.free={json.dumps(entry)}"])
    for _ in range(2):  # given twice it is the same
        study = ask(file, [])
        assert {name: one.added for name, one in study.entries.items()} == {
            "ours": 0,
            "lora": 0,
            "full": 0,
            "late": 1,
            "free": 0,
        }, "a new budget has no look yet"
    found = finished(file).summary["budgets"]["small"]
    assert (found["round"], found["level"]) == (3, 0.005)
    edit(file, [f"entries.later={json.dumps(entry | {'budget': 'small'})}"])
    assert ask(file, []).entries["later"].added == 2
    assert finished(file).summary["budgets"]["small"]["level"] == 0.0025


def test_another_metric_is_another_look(tmp_path: Path, written: WrittenRuns) -> None:
    file = tiny_study(tmp_path)
    edit(file, ["shared.data.metric=contains"])
    finished(file)
    ran = len(written.ran)
    assert {one.added for one in ask(file, ["shared.data.metric=exact"]).entries.values()} == {1}
    assert len(written.ran) == ran


def test_a_study_is_checked_before_it_is_run(tmp_path: Path, written: WrittenRuns) -> None:
    file = tiny_study(tmp_path)
    check(load_study(file))
    finished(file)
    written.digests["data"] = "other"
    with pytest.raises(DataError, match="another data than is there now"):
        check(load_study(file))


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


def test_a_study_by_a_users_metric_names_it_in_the_command_that_goes_on(room: Path) -> None:
    (room / "own.py").write_text("def score(answer, row): return float(answer == '4')")
    first = smoa(*NEW, "--seeds", "1", "--metric", "own.py:score").stdout
    assert "--metric own.py:score --seeds 3` goes on" in first
    assert "give --metric" in smoa("compare", "studies/chats", "--report-only", code=1).stderr
    assert "own.py:score" in smoa("compare", "studies/chats", "--report-only", "--metric", "own.py:score").stdout


def test_tune_is_a_study_of_one_entry_without_final_runs(room: Path, written: WrittenRuns) -> None:
    file = run_file(room, learning_rate=0.0017)
    ran = smoa("tune", str(file))
    assert [line.split()[0] for line in ran.stdout.splitlines()[1:4]] == ["9.6e-4", "1.7e-3", "3e-3"]
    assert ran.stdout.splitlines()[-1] == "  learning_rate: 1.9e-3"
    assert "kept was trained at 1.7e-3." in ran.stdout
    folder = room / "runs" / "own-tuning"
    assert [path.parent.name for path in folder.glob("lora/*/adapter")] == ["lr-1.7e-3-seed-3"]
    number = len(written.ran)
    assert '"interior": true' in smoa("tune", str(file), "--json").stdout
    assert len(written.ran) == number


@pytest.mark.parametrize(
    "change", ["training.max_steps=40", "training.learning_rate=0.1", "training.seed=5", "data.max_length=9"]
)
def test_tune_refuses_another_search_in_its_folder(change: str, room: Path) -> None:
    file = str(run_file(room, learning_rate=0.01))
    smoa("tune", file)
    assert "own-tuning/study.yaml: has another" in smoa("tune", file, change, code=1).stderr
    smoa("tune", file, change, "training.output_dir=runs/other")


def test_tune_starts_at_the_rate_of_the_models_size_and_tries_as_many_as_it_may(
    room: Path, written: WrittenRuns
) -> None:
    values = tuning_study(check_config(yaml.safe_load(run_file(room).read_text())), max_runs=3)
    assert values["entries"]["lora"]["learning_rate"] == adapter_rate(1000)
    assert values["seeds"] == []
    smoa("tune", str(run_file(room)), "--max-runs", "3")
    assert len(list((room / "runs" / "own-tuning").glob("lora/lr-*"))) == 3
    assert load_study(room / "runs" / "own-tuning" / "study.yaml").tuning.max_runs == 3


def test_a_search_goes_by_the_loss_whatever_the_runs_metric(room: Path, written: WrittenRuns) -> None:
    file = run_file(room)
    file.write_text(file.read_text().replace("train: chats.jsonl", "train: chats.jsonl\n  metric: score"))
    assert tuning_study(load_config(file), max_runs=3)["shared"]["data"]["metric"] is None
    assert "learning_rate: " in smoa("tune", str(file), "--max-runs", "3").stdout


def test_tune_recommends_no_rate_where_all_diverged(room: Path, written: WrittenRuns) -> None:
    written.loss = lambda config: None
    told = smoa("tune", str(run_file(room)), "--max-runs", "3", code=1).stderr
    assert "every rate down to" in told
    assert "diverged; start from a much lower one" in told


def test_a_search_that_ends_at_its_edge_says_to_go_on_from_there(room: Path, written: WrittenRuns) -> None:
    written.loss = lambda config: -float(config.training["learning_rate"])
    told = smoa("tune", str(run_file(room))).stdout
    assert "--max-runs" in told
    smoa("tune", str(run_file(room)), "--max-runs", "8")
    assert len(list((room / "runs" / "own-tuning").glob("lora/lr-*"))) == 8
