from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from tests.support.lab import chat_base, saved_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tmp_path_factory.mktemp("chat") / "base")


def test_a_conversation_on_stdin_is_answered_until_it_ends(base: Path) -> None:
    mine = saved_adapter(base.with_name("mine"), base)
    words = ["chat", str(mine), "--max-new-tokens", "12"]
    done = CliRunner().invoke(app, words, input="one\n/both\n/nothing\n/quit\ntwo\n")
    assert done.exit_code == 0, done.output
    assert "base:\n" in done.stdout
    assert "mine:\n" in done.stdout
    assert "/both   answer the last message twice" in done.stdout
    alone = CliRunner().invoke(app, ["chat", str(base), "--max-new-tokens", "12"], input="/both\none\n")
    assert alone.exit_code == 0
    assert "error: this is a model without an adapter" in alone.stderr
