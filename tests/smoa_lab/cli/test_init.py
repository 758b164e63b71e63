"""`smoa init`, and `smoa train` without a file."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa_lab import init
from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config, load_config
from smoa_lab.config.yaml_text import parse_yaml
from smoa_lab.init import config_text, default_run, first_values
from tests.support import lab
from tests.support.lab import chat_base, chats, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _room(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    write_rows(tmp_path / "talks.jsonl", chats(40))


def data_block(rows: list[dict[str, Any]], model: str = "base") -> dict[str, Any]:
    write_rows(Path("rows.jsonl"), rows)
    block: dict[str, Any] = first_values(model, "rows.jsonl")["data"]
    return block


def test_conversations_get_a_template_if_the_model_has_none(tmp_path: Path) -> None:
    found = data_block(chats(40))
    assert found == {"train": "rows.jsonl", "format": "messages", "template": "alpaca", "max_length": 192}
    assert "template" not in data_block(chats(40), str(chat_base(tmp_path / "chat")))


def test_plain_text_needs_no_template() -> None:
    assert "template" not in data_block([{"text": f"Line {i}."} for i in range(20)])


def test_choices_get_a_template() -> None:
    values = first_values("base", "csqa-demo")
    assert (values["data"]["format"], values["data"]["template"]) == ("choices", "alpaca")
    assert values["training"]["output_dir"] == "runs/csqa-demo"


def test_rows_are_cut_where_99_of_100_are_shorter_and_never_beyond_the_model() -> None:
    rows = [{"text": f"Line {i} " * (1 + 60 * (i == 3))} for i in range(300)]
    for all_rows, length in ((rows, 64), ([{"text": f"{i} " * 400} for i in range(20)], 512)):
        write_rows(Path("rows.jsonl"), all_rows)
        assert first_values("base", "rows.jsonl")["data"]["max_length"] == length


def test_size_and_rate_are_by_the_model_and_its_memory_is_saved_if_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    values = first_values("base", "talks.jsonl", "lora:2", "float16")
    assert values["adapter"] == {"target_modules": "all-linear", "num_blocks": 4, "r": 8, "alpha": 16}
    assert values["model"] == {"name": "base", "dtype": "float16"}
    assert (values["training"]["learning_rate"], values["training"]["gradient_checkpointing"]) == (2e-3, False)
    assert values["training"]["logging_steps"] == 1  # of 9 steps
    monkeypatch.setattr(init, "LARGE", 1000)
    assert first_values("base", "talks.jsonl")["training"]["gradient_checkpointing"] is True


ODD = "/rows of #1: mine/" + "long name " * 30 + ".jsonl"
BLOCKS: dict[str, dict[str, Any]] = {
    "rows": {"format": "messages", "max_length": 64},
    "odd names": {"train": ODD, "template": "alpaca"},
}


@pytest.mark.parametrize("case", BLOCKS)
def test_the_file_says_exactly_what_was_chosen_with_a_comment_beside_every_key(tmp_path: Path, case: str) -> None:
    values = first_values("base", "talks.jsonl")
    values["data"] = {"train": "a.jsonl", **BLOCKS[case]}
    file = tmp_path / "mine.yaml"
    file.write_text(config_text(Path("mine.yaml"), values))
    assert parse_yaml(file.read_text(), file) == values
    assert load_config(file) == check_config(values)
    lines = file.read_text().splitlines()
    assert [line for line in lines if line and "# " not in line and not line.startswith("  - ")] == []
    assert max(len(line) for line in lines) <= 130 or case == "odd names"


def invoke(*arguments: str, answers: str | None = None) -> Any:
    return CliRunner().invoke(app, ["init", *arguments], input=answers)


GIVEN = ("--model", "base", "--data", "talks.jsonl", "--dtype", "float32")


def test_a_config_for_rows_is_written(tmp_path: Path) -> None:
    made = invoke("new/mine.yaml", *GIVEN, "--parameters", "lora:2", "--json")
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["file"] == "new/mine.yaml"
    assert load_config(tmp_path / "new" / "mine.yaml") == check_config(report["config"])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(("method", "alpha"), [("smoa", "alpha"), ("lora", "lora_alpha")])
def test_alpha_is_twice_the_rank_that_is_given(method: str, alpha: str) -> None:
    run = default_run("base", "talks.jsonl", [f"method={method}", "adapter.r=12"])
    assert (run.adapter["r"], run.adapter[alpha]) == (12, 24)


def test_the_dtype_is_left_to_the_machine_and_the_method_unless_it_is_given(tmp_path: Path) -> None:
    assert invoke("mine.yaml", "--model", "base", "--data", "talks.jsonl").exit_code == 0
    assert "dtype" not in (tmp_path / "mine.yaml").read_text()
    whole = ("method=full", "adapter={}", "training.learning_rate=1e-4")
    assert load_config(tmp_path / "mine.yaml", [*whole]).model.dtype == "float32"
    for changes in ((), whole):
        assert load_config(tmp_path / "mine.yaml", [*changes, "model.dtype=bfloat16"]).model.dtype == "bfloat16"


def test_a_file_of_an_odd_name_is_written_into_the_command_that_trains_it(tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").rename(tmp_path / "my talks #2.jsonl")
    made = invoke("--model", "base", "--data", "my talks #2.jsonl")
    assert "Train: smoa train 'my talks #2.yaml'\n" in made.stdout
    assert "# Run it: smoa train 'my talks #2.yaml';" in (tmp_path / "my talks #2.yaml").read_text()


def train(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments])


def test_a_model_and_data_are_trained_without_a_file_as_init_would_write_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "talks.jsonl", [*chats(40), {"messages": "none"}])
    given = ("--model", "base", "--data", "talks.jsonl")
    changes = ("model.dtype=float32", "data.skip_bad_rows=true", "training.max_steps=2", "data.samples=1")
    changes = (*changes, "training.use_cpu=true", "adapter.target_modules=[q_proj]")
    done = train(*changes, *given)
    assert done.exit_code == 0, done.output
    assert "Run folder: runs/talks\n" in done.stderr
    assert "Adapter, metrics, log and loss curve: runs/talks" in done.stdout
    stored = load_config(tmp_path / "runs" / "talks" / "config.yaml")
    write_rows(tmp_path / "talks.jsonl", chats(40))
    assert invoke("talks.yaml", *given).exit_code == 0
    assert stored == load_config(tmp_path / "talks.yaml", list(changes))
    assert CliRunner().invoke(app, ["merge", "runs/talks", "merged"]).exit_code == 0
    assert CliRunner().invoke(app, ["eval", "runs/talks"]).exit_code == 0
    assert "Run folder: runs/talks-2\n" in train(*given, *changes).stderr


def test_a_method_is_sized_with_the_users_keys_and_another_size_is_told(caplog: pytest.LogCaptureFixture) -> None:
    narrow = ["method=vera", "adapter.target_modules=[q_proj]"]
    vera = default_run("base", "talks.jsonl", narrow)  # as LoRA with r = 8 on q_proj, 2 * 8 * 64
    assert vera.adapter["r"] == (2 * 8 * 64 - 2 * 32) // 2
    assert default_run("base", "talks.jsonl", ["method=vera", "adapter.r=3"]).adapter["r"] == 3
    ours = default_run("base", "talks.jsonl", ["adapter.num_blocks=8"]).adapter
    assert (ours["r"], ours["alpha"]) == (64, 128)
    assert default_run("base", "talks.jsonl", ["method=adalora", "adapter.total_step=9"]).adapter["total_step"] == 9
    assert caplog.text == ""
    default_run("base", "talks.jsonl", ["method=lokr"])
    assert "method: lokr can't have the 7,424 parameters of lora:8" in caplog.text


BOTH = "give the YAML file of a run, which names model and data, or both --model and --data"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), BOTH),
        (("--model", "base"), BOTH),
        (("run.yaml", "--data", "talks.jsonl"), BOTH),
        ((*GIVEN[:4], "adapter.rr=4"), "adapter.rr"),
        ((*GIVEN[:4], "method=vera", "adapter.rr=4"), "adapter.rr"),
        ((*GIVEN[:4], "method=vera", "adapter.target_modules='['"), "adapter: unterminated character set"),
        ((*GIVEN[:4], "model.trust_remote_code=true"), "model.trust_remote_code: unknown key"),
    ],
)
def test_what_cannot_be_trained_without_a_file_is_one_error(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = train(*arguments)
    assert refused.exit_code == 1
    assert message in refused.stderr
    assert refused.stderr.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


def test_model_and_data_are_asked_for(tmp_path: Path) -> None:
    made = invoke("mine.yaml", answers="base\ntalks.jsonl\n")
    assert made.exit_code == 0, made.output
    assert "train: talks.jsonl" in (tmp_path / "mine.yaml").read_text()
    assert invoke("other.yaml", answers="").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mine.txt", *GIVEN), "mine.txt: the name of a config ends in .yaml"),
        (("talks.jsonl/mine.yaml", *GIVEN), "talks.jsonl"),
        (("--model", "base", "--data", "bad.jsonl"), "1 bad row; nothing is trained"),
        (("--model", "base", "--data", "bad.jsonl"), "instead of smoa init, smoa train --model … --data … data.skip"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    write_rows(tmp_path / "bad.jsonl", [*chats(3), {"messages": "none"}])
    refused = invoke(*arguments)
    assert refused.exit_code == 1
    assert message in refused.output
    assert list(tmp_path.glob("*.y*ml")) == []


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "talks.yaml").write_text("mine")
    for name in (("talks.yaml",), ()):
        refused = invoke(*name, *GIVEN)
        assert refused.exit_code == 1
        assert "talks.yaml: exists and is not overwritten; choose another name" in refused.output
    assert (tmp_path / "talks.yaml").read_text() == "mine"
