import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

import smoa
from smoa import SmoaConfig
from smoa.errors import DataError, SmoaError
from smoa_lab.base_models import empty_model
from smoa_lab.cli.console import reporting
from smoa_lab.cli.main import app
from smoa_lab.config.run import ModelSection
from tests.support import lab
from tests.support.lab import saved_adapter, stored_metrics

OUTSIDE = """
import sys
from smoa_lab.__main__ import main
for arguments in {commands}:
    sys.argv = ["smoa", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code)
    print("heavy:", sorted({{"torch", "transformers", "peft", "smoa", "jinja2"}} & set(sys.modules)))
"""


def test_help_and_version_wait_for_no_heavy_import_and_a_wrong_command_is_a_usage_error() -> None:
    commands = [["--help"], ["train", "--help"], ["data", "--help"], ["--version"], ["trian"]]
    command = [sys.executable, "-c", OUTSIDE.format(commands=commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage") == 3
    assert f"smoa {smoa.__version__}\nended with 0\n" in done.stdout
    assert done.stdout.count("heavy: []") == len(commands)
    assert "trian" in done.stderr
    assert "ended with 2" in done.stdout


EVIL = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}


def strangers_model(base: Path, room: Path) -> Path:
    """Make the folder of a model with code of its own; the file that the code leaves in ``room``."""
    base.mkdir(exist_ok=True)
    file = base / "config.json"
    known = json.loads(file.read_text()) if file.exists() else {"model_type": "evil"}
    file.write_text(json.dumps({**known, "auto_map": EVIL}))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": EVIL}))
    (base / "evil.py").write_text(f"import pathlib\npathlib.Path('{room}/RAN').touch()\n")
    return room / "RAN"


@pytest.mark.parametrize(
    ("command", "method"),
    [
        *(("chat RUN", "full"), ("chat RUN", "smoa"), ("eval RUN", "full"), ("convert RUN lora --rank 1", "smoa")),
        *(("merge RUN merged", "smoa"), ("inspect RUN", "smoa")),
    ],
)
@pytest.mark.parametrize("asks", [False, True], ids=["", "asks"])
def test_the_folder_of_a_stranger_runs_no_code(
    command: str, method: str, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what lies in it nor that of the base that it names, whatever its files say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    run, honest = tmp_path / "run", lab.tiny_base(tmp_path / "honest")
    base = run / "adapter" if method == "full" else tmp_path / "base"
    saved_adapter(run / "adapter", honest)
    config = SmoaConfig.from_pretrained(run / "adapter")
    config.base_model_name_or_path = str(base)
    config.save_pretrained(run / "adapter")
    ran = strangers_model(base, tmp_path)
    key = "trust_remote_code: true, " if asks else ""
    (run / "config.yaml").write_text(
        f"model: {{name: {base}, {key}options: {{}}}}\nmethod: {method}\n"
        "data: {train: csqa-demo}\ntraining: {use_cpu: true}\n"
    )
    (run / "metrics.json").write_text(json.dumps(stored_metrics()))
    done = CliRunner().invoke(app, command.replace("RUN", "run").split(), input="y\ny\n")
    assert not ran.exists()
    assert done.exception is None or isinstance(done.exception, SystemExit)
    name = command.split()[0]
    if asks:
        assert "model.trust_remote_code: unknown key" in done.stderr
    elif name == "report":
        assert done.exit_code == 0
    else:
        assert "contains custom code" in done.stderr.replace("\n", " "), done.stderr


def test_a_model_that_transformers_knows_is_sized_without_the_code_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = strangers_model(lab.tiny_base(tmp_path / "base"), tmp_path)
    done = CliRunner().invoke(app, ["budget", str(tmp_path / "base"), "10%"])
    assert done.exit_code == 0, done.stderr
    assert not ran.exists()


def test_the_commands_option_lets_a_repository_run_its_code_until_the_command_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = strangers_model(tmp_path / "base", tmp_path)
    budget = ["budget", str(tmp_path / "base"), "1M"]
    CliRunner().invoke(app, budget)
    assert not ran.exists()
    CliRunner().invoke(app, [*budget, "--trust-remote-code"])
    assert ran.exists()
    ran.unlink()
    with pytest.raises(SmoaError):
        empty_model(ModelSection(name=str(tmp_path / "base")))
    assert not ran.exists()


def commands(command: Any) -> Iterator[Any]:
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from commands(one)


def test_help_texts_are_shown_in_full() -> None:
    """Typer takes them for rich's markup, in which a word in brackets is a style."""
    found = list(commands(typer.main.get_command(app)))
    assert len(found) > 10
    for command in found:
        for text in (command.help, command.epilog, *(getattr(option, "help", None) for option in command.params)):
            assert Text.from_markup(text or "").plain == (text or "")


def test_every_command_has_an_example_that_it_takes() -> None:
    app_command: Any = typer.main.get_command(app)
    for command in commands(app_command):
        if getattr(command, "commands", None) or command.name == "run":
            continue
        opening, smoa_name, *words = shlex.split(command.epilog)
        assert (opening, smoa_name) == ("Example:", "smoa")
        chosen: Any = app_command
        while getattr(chosen, "commands", None):
            chosen, *words = chosen.commands[words[0]], *words[1:]
        assert chosen is command
        chosen.make_context(command.name, words)  # raises for an option or a value that it does not have


# errors


def test_an_error_of_ours_is_one_line_on_stderr_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise DataError("piqa: no such column")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: piqa: no such column\n"


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert "a run goes on from its last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "run/checkpoint-2/optimizer.pt"),
        OSError(27, "File too large", "run/adapter/README.md"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 16256 vs 16144"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_an_error_of_a_library_is_one_line_without_a_traceback_unless_it_is_asked_for(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"error: {type(error).__name__}: {error}\n"
    monkeypatch.setenv("SMOA_TRACEBACK", "1")
    with pytest.raises(type(error)), reporting():
        raise error
