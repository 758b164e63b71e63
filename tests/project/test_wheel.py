"""The wheel, built from the source distribution, works where nothing of this checkout is: Python and command."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.slow.processes import SCRIPTS, build_environment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = "\n".join(re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL))
ELSEWHERE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
ELSEWHERE |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    for tool in ("build", "hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(tool, reason="the extra `dev` is not up to date")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, env=ELSEWHERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel."""
    (wheel,) = dist.glob("*.whl")
    return build_environment(
        tmp_path_factory.mktemp("environment"), "--no-index", "--no-deps", "--force-reinstall", str(wheel)
    )


FIRST = """
import sys, peft, transformers
lab = {"altair", "datasets", "gguf", "pydantic", "rich", "typer"} - set(sys.modules)  # what these two import counts not
import smoa
assert not lab & set(sys.modules), lab & set(sys.modules)
"""
ASK = """
import runpy, sys, smoa
from smoa_lab.data.sources import read_rows
from smoa_lab.data.general_text import passages
from smoa_lab.data.sources import DEMO_FILE
print("\\nASKED", smoa.__file__)
print(len(passages("packaged")))
print(len(list(read_rows(DEMO_FILE))), DEMO_FILE.with_name("csqa_demo.LICENSE").is_file())
sys.argv[1:] = ["--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow  # an environment, and a process that imports everything
def test_the_readmes_python_the_command_the_demo_the_text_for_forgetting_and_pages_come_with_the_wheel(
    python: Path, tiny_gemma3: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_gemma3.save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    smoa = str(python.parents[1] / SCRIPTS / "smoa")
    program = f"{FIRST}\n{PYTHON}\nsys.argv[0] = {smoa!r}\n{ASK}"
    (tmp_path / "readme.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [str(python), "readme.py"], cwd=tmp_path, env=ELSEWHERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    place, demo, rows, *told = done.stdout.partition("\nASKED ")[2].splitlines()
    assert place.startswith(str(python.parents[1]))
    assert (demo, rows) == (f"{Path('runs/demo')} 34 True", "1884 True")
    assert {"train", "eval", "merge", "convert"} <= set(re.findall(r"\w+", "".join(told)))


def test_the_wheel_has_every_file_and_a_page_without_a_link_that_leads_nowhere(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (name,) = [name for name in packed if name.endswith("METADATA")]
        page = archive.read(name).decode().partition("\n\n")[2]
    own = {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src").rglob("*") if file.is_file()}
    assert {name for name in own if "__pycache__" not in name} <= packed
    assert "# smoa" in page
    assert re.findall(r"\]\((?!https?://)[^)]*\)", page) == []
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        files = {file.partition("/")[2] for file in archive.getnames()}
    named = set(re.findall(r": `([\w./-]+\.(?:md|cff)|LICENSE)`", page))
    assert {"docs/quickstart.md", "CHANGELOG.md", "LICENSE"} <= named <= files
