import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from smoa_lab.cli.main import app
from tests.support.lab import chat, chats, rows_base, rows_values, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))


def check(place: Path | str, base: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["data", "check", str(place), "--model", str(base), *options])


def test_what_would_be_trained_stands_between_brackets_in_a_pipe(base: Path, tmp_path: Path) -> None:
    done = check(write_rows(tmp_path / "rows.jsonl", [{"messages": chat("Open?", "Yes.")}]), base)
    assert done.exit_code == 0, done.stderr
    assert "rows.jsonl: messages; rows: 1 train\n" in done.stdout
    assert "--- example 1 of 1" in done.stdout
    assert "<|im_start|>user\nOpen?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n" in done.stdout


def test_rows_are_counted_and_bad_ones_are_listed(base: Path, tmp_path: Path) -> None:
    long = {"messages": chat("a" * 300, "Yes.")}
    file = write_rows(tmp_path / "rows.jsonl", [*chats(6), chats(1)[0], long, {"messages": []}, {"messages": None}])
    done = check(file, base, "data.max_length=100", "--examples", "0")
    assert done.exit_code == 1, done.stderr
    for line in (
        "1 rows are cut at 100 tokens",
        "1 rows are dropped: nothing that is trained is left in them",
        "1 rows repeat an earlier one",
        "0 training rows are dropped, since held-out rows are the same",
        "2 bad rows",
        f"  {file}, row 9: messages: found [], expected a list of at least one message",
    ):
        assert f"\n{line}\n" in done.stdout
    assert "example" not in done.stdout


def test_rows_that_are_all_bad_are_listed_too_and_json_has_the_account_alone(base: Path, tmp_path: Path) -> None:
    done = check(write_rows(tmp_path / "rows.jsonl", [{"a": 1}]), base)
    assert done.exit_code == 1
    assert "no format recognized; rows: none that can be trained on" in done.stdout
    assert "1 bad rows" in done.stdout
    account = json.loads(check(write_rows(tmp_path / "rows.jsonl", chats(5)), base, "--json").stdout)
    assert sum(account["parts"].values()) == 5
    assert account["format"] == "messages"


def test_a_runs_file_says_model_and_rows(base: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", chats(5))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(rows_values(tmp_path, file, base, data={"max_length": 40})))
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.stderr
    assert "5 rows are cut at 40 tokens" in done.stdout
    values = rows_values(tmp_path, write_rows(file, [*chats(5), {"a": 1}]), base, data={"skip_bad_rows": True})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path / "run.yaml")])
    assert (done.exit_code, "1 bad rows" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("times", "data", "told"),
    [
        (1, {"metric": "number"}, "data.metric: number: the completion of held-out row 1, 'Yes.', has no number"),
        (300, {"max_length": 2000}, "which has 1,024 positions; set it to 1024"),
    ],
)
def test_a_run_that_would_be_refused_for_its_rows_is_no_good_one(
    times: int, data: dict[str, object], told: str, base: Path, tmp_path: Path
) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl", [{"messages": chat(f"{'Open' * times} {i}?", "Yes.")} for i in range(20)]
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(rows_values(tmp_path, file, base, data=data)))
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path / "run.yaml")])
    assert (done.exit_code, told in done.stderr) == (1, True), done.output
