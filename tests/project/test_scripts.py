"""Scripts and workflows that no test can run still import, call and name what is there."""

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slow import peft_suite

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    file for folder in ("examples", "benchmarks", "docs/figures", "studies") for file in (ROOT / folder).glob("*.py")
)


def test_scripts_import_what_smoa_has() -> None:
    assert len(SCRIPTS) > 20
    for node in (node for script in SCRIPTS for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))):
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


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def jobs(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
    return found


def called(file: Path) -> list[str]:
    """The make targets of a workflow."""
    steps = [step for job in jobs(file).values() for step in job.get("steps", [])]
    commands = [word for step in steps for word in re.findall(r"^make (.+)$", step.get("run", ""), re.MULTILINE)]
    return [word for command in commands for word in command.split() if "=" not in word]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_workflow_calls_targets_files_and_jobs_that_exist(file: Path) -> None:
    assert set(called(file)) <= TARGETS
    for job in jobs(file).values():
        assert "uses" not in job or (ROOT / job["uses"]).is_file()
        assert set(job.get("needs", [])) <= jobs(file).keys()


def test_every_python_that_the_package_names_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert jobs(ROOT / ".github/workflows/tests.yml")["test"]["strategy"]["matrix"]["python"] == named


def test_only_the_job_that_publishes_may_ask_for_an_identity() -> None:
    allowed = [(file.stem, name) for file in FILES for name, job in jobs(file).items() if "id-token" in str(job)]
    assert allowed == [("release", "publish")]
