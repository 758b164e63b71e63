"""Imports point one way."""

import ast
import pkgutil
import re
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
LIBRARY = ["errors", "compat", "partition", "kernels", "spectrum", "scores", "config", "distributed"]
LIBRARY += ["adapter_names", "kept", "route", "merging", "adapter", "layer", "mixed_batch"]
LIBRARY += ["linear", "embedding", "conv", "quantized", "stand_in", "experts"]
LIBRARY += ["merged", "generation", "combining", "hotswap", "model", "integrations", "vllm"]
"""Each may import what stands before it."""
LAB = ["basics", "data", "config", "pages", "base_models", "scoring", "training", "open_run", "evaluate", "budget"]
LAB += ["export", "inspect", "chat", "init", "study", "cli"]


def module_of(file: Path) -> str:
    """`smoa.spectrum`, or `smoa.kernels` for its `__init__.py`."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


@cache
def imported_by(module: str) -> set[str]:
    """The modules of ours that a module imports, also within functions."""
    found: set[str] = set()
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            members = {f"{node.module}.{name.name}" for name in node.names} & MODULES.keys()
            found |= members or {str(node.module)}
    return found & MODULES.keys()


def arrows(package: str) -> set[tuple[str, str, str]]:
    """(importing module, its part, the part that it imports from) within a package."""
    found = set()
    for module in MODULES:
        parts = module.split(".")
        if parts[0] == package and len(parts) > 1:
            targets = (name.split(".") for name in imported_by(module) if name.startswith(f"{package}."))
            found |= {(module, parts[1], target[1]) for target in targets if target[1] != parts[1]}
    return found


@pytest.mark.parametrize(("package", "order"), [("smoa", LIBRARY), ("smoa_lab", LAB)])
def test_modules_import_only_what_lies_below_them(package: str, order: list[str]) -> None:
    top = {"__main__", "registration"}
    wrong = [
        f"{module} imports from {target}"
        for module, part, target in sorted(arrows(package))
        if part not in top and order.index(target) > order.index(part)
    ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: imported_by(module) - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_library_never_imports_the_lab() -> None:
    wrong = [
        (module, name)
        for module in MODULES
        if module.split(".")[0] == "smoa" and module != "smoa.__main__"
        for name in imported_by(module)
        if name.startswith("smoa_lab")
    ]
    assert wrong == []


def test_the_kernels_import_neither_peft_nor_transformers() -> None:
    of_maths = ("smoa.kernels", "smoa.partition", "smoa.spectrum")
    for module in (module for module in MODULES if module.startswith(of_maths)):
        text = MODULES[module].read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (peft|transformers)\b", text, re.MULTILINE), module


@pytest.mark.parametrize(("package", "order"), [("smoa", LIBRARY), ("smoa_lab", LAB)])
def test_contributing_draws_the_same_order(package: str, order: list[str]) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawing = page.split(f"src/{package}/ ")[1].split("\n\n")[0].split("```")[0]
    lines = re.findall(r"^  (\w+(?:, \w+)*)(?:  |$)", drawing, re.MULTILINE)
    assert [name for line in lines for name in line.split(", ")] == order


def test_a_file_has_at_most_400_lines_and_a_name_of_its_own() -> None:
    long = [module for module, file in MODULES.items() if len(file.read_text(encoding="utf-8").splitlines()) > 400]
    assert long == []
    names = Counter(file.name for file in MODULES.values())
    twice = {name for name, count in names.items() if count > 1} - {"__init__.py", "__main__.py"}
    assert twice <= {
        "blocks.py",
        "budget.py",
    }  # ΔW's blocks and the products with them; the library's budget and its command


def test_every_path_that_the_documents_name_can_be_imported() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    paths = {
        path
        for document in documents
        for path in re.findall(r"(?:^::: |`)(smoa(?:\.\w+)+)(?=[`(\s]|$)", document.read_text("utf-8"), re.MULTILINE)
    }
    assert {"smoa.hotswap.hotswap_adapter", "smoa.register_partition"} <= paths
    for path in sorted(paths):
        pkgutil.resolve_name(path)
