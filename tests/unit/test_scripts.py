"""Scripts that need more than the tests install, or longer than a test may take, still import what is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests import peft_suite

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    file for folder in ("examples", "benchmarks", "docs/figures", "studies") for file in (ROOT / folder).glob("*.py")
)


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 20


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_script_imports_what_smoa_has(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("smoa", "smoa_lab"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


def test_what_pefts_own_tests_are_left_out_for_is_told_in_a_page_or_a_test_that_exists() -> None:
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for reason in peft_suite.LEFT_OUT.values():
        for name in re.findall(r"\b(?:tests|docs)/[\w./-]+\w|\btest_\w+(?:\.py)?", reason):
            known = (ROOT / name).is_file() or f"def {name}(" in tests or any((ROOT / "tests").rglob(name))
            assert known, name
