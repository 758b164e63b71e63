import os
import signal
from pathlib import Path

import pytest
import torch

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.training import run_folder
from smoa_lab.training.run_folder import RunFolder, in_free_folder, peak_memory, reset_peak_memory


def begun(run: RunFolder, config: str, inputs: dict[str, str] | None = None) -> str | None:
    """The checkpoint from which a run that claims the folder goes on."""
    with run.claimed(config, inputs or {}) as checkpoint:
        return checkpoint


SMOA, LORA = (f"method: {method}\ntraining: {{output_dir: run}}\n" for method in ("smoa", "lora"))
"""Configs as runs write them, but for what does not matter here."""


def test_provenance_without_git_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    made = run_folder.provenance(0, torch.device("cpu"))
    assert (made["commit"], made["dirty"]) == (None, None)
    assert made["device"]


def test_half_a_checkpoint_is_removed_and_the_whole_one_before_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SMOA)
    for step, state in ((2, "{}"), (3, '{"epoch": 1.'), (4, None)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    assert begun(RunFolder(tmp_path), SMOA) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_unfinished_run_is_resumed_by_the_same_config_in_other_words(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text("method: smoa\ntraining: {eval_strategy: 'no', learning_rate: 1.0e-05}\n")
    assert begun(run, "method: smoa\ntraining:\n  eval_strategy: no\n  learning_rate: 1e-05\n") is None
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(
        ConfigError, match=r"unfinished run of another config, with training\.learning_rate=1e-05; take"
    ):
        begun(run, "method: smoa\ntraining:\n  eval_strategy: no\n  learning_rate: 1e-04\n")


def test_a_run_that_has_no_checkpoint_yet_gives_way_to_another_config(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    begun(run, SMOA)
    assert begun(run, LORA) is None
    assert run.config.read_text() == LORA


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_run_that_was_killed_while_it_claimed_its_folder_starts_again(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, files = RunFolder(tmp_path), list[Path]()

    def killed(path: Path, text: str) -> None:
        if len(files) == written:
            raise KeyboardInterrupt
        files.append(path)
        path.write_text(text)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt), run.claimed(SMOA, {"data": "a"}):
            raise KeyboardInterrupt
    run.check(SMOA)
    with run.claimed(SMOA, {"data": "a"}) as checkpoint:
        assert checkpoint is None


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "adapter/README.md", "config.yaml", "notes.txt"])
def test_a_folder_of_other_files_is_refused(name: str, tmp_path: Path) -> None:
    """The config is that of another program."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("base_model: mine")
    with pytest.raises(ConfigError, match="has files and no run of smoa's"):
        RunFolder(tmp_path).check(SMOA)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "base_model: mine"


def test_a_users_own_config_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SMOA)
    with pytest.raises(ConfigError, match="has files and no run of smoa's"):
        RunFolder(tmp_path).check(SMOA)


def test_a_second_run_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    run = RunConfig(model={"name": "x"}, data={"train": "x"}, training={"output_dir": str(tmp_path / "run")})
    assert in_free_folder(run) == run
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").touch()
    assert in_free_folder(run).folder == tmp_path / "run-2"


def test_of_checkpoints_only_those_of_the_trainer_are_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert begun(run, SMOA) is None
    (tmp_path / "checkpoint-notes.txt").touch()
    for name in ("checkpoint-2", "checkpoint-best", "checkpoint-2-copy"):
        (tmp_path / name).mkdir()
    run.finish({})
    assert {path.name for path in tmp_path.glob("checkpoint*")} == {
        *("checkpoint-best", "checkpoint-2-copy", "checkpoint-notes.txt")
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_that_failed_or_whose_process_died_leaves_its_folder_free(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(OSError, match="disk is full"), run.alone():
        raise OSError("disk is full")
    assert run.lock.exists()
    run.check(SMOA)
    process = os.fork()
    if process == 0:
        with run.alone():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert run.lock.exists()
    run.check(SMOA)


def test_the_other_processes_of_a_run_are_let_in_by_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.alone():
        monkeypatch.setenv("RANK", "1")
        second.check(SMOA)
        with second.alone():
            assert begun(second, SMOA) is None


def interrupted(folder: Path, inputs: dict[str, str] | None) -> RunFolder:
    """A run with one checkpoint."""
    run = RunFolder(folder)
    folder.mkdir()
    begun(run, f"method: smoa\ntraining: {{output_dir: {folder}}}\n", inputs)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    return run


def test_an_interrupted_run_that_was_renamed_is_resumed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    interrupted(old, {"data": "a"})
    old.rename(new)
    text = f"method: smoa\ntraining: {{output_dir: {new}}}\n"
    assert begun(RunFolder(new), text, {"data": "a"}) == str(new / "checkpoint-2")


def test_an_interrupted_run_is_resumed_whatever_scores_its_answers(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "run", {"data": "a"})
    for data in ("{metric: exact}", "{metric: contains}", "{}"):
        text = f"{run.config.read_text().partition('data:')[0]}data: {data}\n"
        assert begun(run, text, {"data": "a"}) == str(run.path / "checkpoint-2")
    with pytest.raises(ConfigError, match="unfinished run of another config"):
        begun(run, text.replace("{}", "{samples: 1}"), {"data": "a"})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can't be reset here")
def test_the_peak_of_memory_is_a_runs_own() -> None:
    held = torch.ones(2**28, dtype=torch.uint8)
    before = peak_memory(held.device)
    del held
    reset_peak_memory()
    assert peak_memory(torch.device("cpu")) < before - 2**27
