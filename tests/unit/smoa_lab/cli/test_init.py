from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa_lab.cli import init
from smoa_lab.cli.main import app
from smoa_lab.config.run import RunConfig, load_config
from smoa_lab.init import default_run
from tests.support import lab
from tests.support.proposals import rows_file, talks

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # TRL sets it
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _room(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    rows_file(tmp_path / "talks.jsonl", talks(40))


def invoke(*arguments: str, answers: str | None = None) -> Any:
    return CliRunner().invoke(app, ["init", *arguments], input=answers)


GIVEN = ("--model", "base", "--data", "talks.jsonl", "--dtype", "float32")


def test_a_config_for_rows_is_written_and_trains(tmp_path: Path) -> None:
    made = invoke("new/mine.yaml", *GIVEN, "--minutes", "30", "--parameters", "lora:2", "--json", "--yes")
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["measured"]["seconds_per_step"] > 0
    assert (report["file"], report["steps"]) == ("new/mine.yaml", report["config"]["training"].get("max_steps", 9))
    config = load_config(tmp_path / "new" / "mine.yaml")
    assert isinstance(config, RunConfig)
    assert (config.data.chat_template, config.data.format) == ("alpaca", "messages")
    assert config.adapter["r"] == 8
    assert config.model_dump()["adapter"] == report["config"]["adapter"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["mine.yaml"]
    changes = ["training.max_steps=2", "training.use_cpu=true", "data.samples=1"]
    trained = CliRunner().invoke(app, ["train", "new/mine.yaml", *changes], catch_exceptions=False)
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_config.json").is_file()


def train(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments])


def test_a_model_and_data_are_trained_without_a_file_as_init_would_write_it(tmp_path: Path) -> None:
    rows_file(tmp_path / "talks.jsonl", [*talks(40), {"messages": "none"}])
    given = ("--model", "base", "--data", "talks.jsonl")
    changes = ("model.dtype=float32", "data.skip_bad_rows=true", "training.max_steps=2", "data.samples=1")
    changes = (*changes, "training.use_cpu=true", "adapter.target_modules=[q_proj]")
    done = train(*changes, *given)
    assert done.exit_code == 0, done.output
    assert "Run folder: runs/talks\n" in done.stderr
    assert "Adapter, metrics, log and loss curve: runs/talks" in done.stdout
    stored = load_config(tmp_path / "runs" / "talks" / "config.yaml")
    rows_file(tmp_path / "talks.jsonl", talks(40))
    assert invoke("talks.yaml", *given, "--no-measure", "--yes").exit_code == 0
    assert stored == load_config(tmp_path / "talks.yaml", list(changes))
    assert CliRunner().invoke(app, ["merge", "runs/talks", "merged"]).exit_code == 0
    assert CliRunner().invoke(app, ["eval", "runs/talks"]).exit_code == 0
    assert "Run folder: runs/talks-2\n" in train(*given, *changes).stderr


def test_without_a_file_a_method_of_lora_gets_lora_of_the_same_size() -> None:
    run = default_run("base", "talks.jsonl", ["method=dora", "adapter.lora_dropout=0.1"])
    block = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
    assert (run.method, run.adapter) == ("dora", block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model is missing: name the YAML file of a run, or give both --model and --data"),
        (("--model", "base"), "--data is missing"),
        (("run.yaml", "--data", "talks.jsonl"), "run.yaml: a run's file has its own model and data"),
        (("--model", "base", "--data", "none.jsonl"), "none.jsonl: no such file"),
        (("--model", "base", "--data", "odd.jsonl"), "odd.jsonl"),
        (("--model", "nowhere/at/all", "--data", "talks.jsonl"), "cannot load 'nowhere/at/all'"),
        ((*GIVEN[:4], "adapter.rr=4"), "adapter.rr"),
        ((*GIVEN[:4], "model.trust_remote_code=true"), "if you trust it, give --trust-remote-code"),
    ],
)
def test_what_cannot_be_trained_without_a_file_is_one_error(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    rows_file(tmp_path / "odd.jsonl", [{"columns": "unknown"}])
    refused = train(*arguments)
    assert refused.exit_code == 1
    assert message in refused.stderr
    assert refused.stderr.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


def test_a_task_gives_a_config_of_questions(tmp_path: Path) -> None:
    lab.fill_cache(tmp_path / "cache", lab.questions(20, "train"), lab.questions(5, "test"))
    made = invoke("--model", "base", "--data", "arc_easy", "--no-measure", "--yes")
    assert made.exit_code == 0, made.output
    assert "arc_easy.yaml: written" in made.output
    assert isinstance(load_config(tmp_path / "arc_easy.yaml"), RunConfig)


def test_without_a_terminal_a_missing_option_is_named() -> None:
    for given, missing in ((("--data", "talks.jsonl"), "--model"), (("--model", "base"), "--data")):
        refused = invoke(*given)
        assert refused.exit_code == 1
        assert f"{missing} is missing" in refused.output


def test_on_a_terminal_a_wrong_answer_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_on_terminal", lambda: True)
    answers = ["nowhere/at/all", "base", "none.jsonl", "talks.jsonl", "much", "", "x", "-5", "nan", "0", "old.txt", ""]
    made = invoke("--dtype", "float32", answers="\n".join(answers) + "\n")
    assert made.exit_code == 0, made.output
    for error in (
        "model.name: cannot load",
        "none.jsonl",
        "'much' is neither",
        "'x' is not a valid number of minutes",
        "'-5' is not a valid number of minutes",
        "'nan' is not a valid number of minutes",
        "ends in .yaml",
    ):
        assert error in made.output
    assert "num_train_epochs: 3" in (tmp_path / "talks.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mine.txt", *GIVEN), "mine.txt: the name of a config ends in .yaml"),
        (("talks.jsonl/mine.yaml", *GIVEN), "mine.yaml: cannot be written (Not a directory); choose another place"),
        ((*GIVEN, "--parameters", "1"), "too small"),
        ((*GIVEN, "--minutes", "5", "--no-measure"), "leave out --no-measure, or --minutes"),
        (("--model", "nowhere/at/all", "--data", "talks.jsonl"), "cannot load 'nowhere/at/all'"),
        (("--model", "base", "--data", "none.jsonl"), "none.jsonl"),
        (("--model", "base", "--data", "bad.jsonl"), "1 bad row; nothing is trained"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    rows_file(tmp_path / "bad.jsonl", [*talks(3), {"messages": "none"}])
    refused = invoke(*arguments, "--yes")
    assert refused.exit_code == 1
    assert message in refused.output
    assert list(tmp_path.glob("*.y*ml")) == []


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "talks.yaml").write_text("mine")
    for name in (("talks.yaml",), ()):
        refused = invoke(*name, *GIVEN, "--yes")
        assert refused.exit_code == 1
        assert "talks.yaml: exists and is not overwritten; choose another name" in refused.output
    assert (tmp_path / "talks.yaml").read_text() == "mine"
