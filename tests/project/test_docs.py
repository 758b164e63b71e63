"""The documents are run: their Python on tiny models, their commands through the parser, their links to the end."""

import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from peft import PeftConfig
from pydantic import BaseModel
from transformers import PreTrainedModel

from smoa import SmoaConfig
from smoa_lab.cli.main import app
from smoa_lab.config.run import (
    DataSection,
    ForgettingSection,
    ModelSection,
    RunConfig,
    check_config,
    load_config,
)
from smoa_lab.study.study import Entry, Study, Tuning
from tests.support.lab import byte_tokenizer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Generated pages only show what was measured.
GENERATED = ("studies",)
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in GENERATED)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "README.md", *PAGES]
NOT_IN_NAVIGATION = ("results.md", "decisions.md")
BASE_MODELS = ("google/gemma-3-270m", "HuggingFaceTB/SmolLM2-135M-Instruct")
# `<!-- not run: REASON -->` before a block of Python says why no test can run it. A block within a comment is run and
# not shown.
PYTHON = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHELL = re.compile(r"^```(?:console|bash|shell|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(path: Path) -> Iterator[str]:
    for block in PYTHON.finditer(path.read_text(encoding="utf-8")):
        if block["reason"] is None:
            yield block["code"]


def commands(path: Path) -> Iterator[list[str]]:
    """Words of every command in the shell blocks, without prompt, comment and environment variables."""
    for block in SHELL.findall(path.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


WITH_PYTHON = [path for path in DOCUMENTS if any(python_blocks(path))]
SMOA_COMMANDS = [
    pytest.param(words[1:], id=f"{name_of(path)}: {' '.join(words)}")
    for path in DOCUMENTS
    for words in commands(path)
    if words[0] == "smoa"
]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # PEFT 0.21 calls it
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile does
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # TRL's default, on a CPU
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs(
    page: Path, tiny_gemma3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a folder takes the place of the model of that name
    tiny_gemma3.resize_token_embeddings(len(byte_tokenizer()), mean_resizing=False)
    for name in BASE_MODELS:
        tiny_gemma3.save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(python_blocks(page), start=1):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)


@pytest.mark.parametrize("words", SMOA_COMMANDS)
def test_a_command_of_the_documents_is_one(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    context: Any = command.make_context("smoa", list(words))
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(words), parent=context)  # unknown options and bad values raise
    given = context.params.get("config") or context.params.get("run") or context.params.get("study")
    if isinstance(given, Path) and given.parts[0] == "configs":
        assert (ROOT / given).is_file()
        if name in ("train", "eval", "demo"):
            load_config(ROOT / given, context.params["overrides"])


def test_other_commands_of_the_documents_name_files_and_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    missing = []
    for path in DOCUMENTS:
        for program, *arguments in commands(path):
            if program == "python" and arguments and arguments[0].endswith(".py"):
                missing += [] if (ROOT / arguments[0]).is_file() else [f"{name_of(path)}: {arguments[0]}"]
            if program == "make":
                targets = [word for word in arguments if "=" not in word]
                missing += [f"make {one}" for one in targets if not re.search(rf"^{one}:", makefile, re.MULTILINE)]
    assert missing == []


@pytest.mark.parametrize("page", [path for path in PAGES if YAML.search(path.read_text(encoding="utf-8"))], ids=name_of)
def test_a_run_shown_as_yaml_is_valid(page: Path) -> None:
    for block in YAML.findall(page.read_text(encoding="utf-8")):
        values = yaml.safe_load(block)
        if {"model", "data", "training"} <= set(values):
            check_config(values)


def test_local_links_lead_somewhere() -> None:
    links = [(document, link) for document in DOCUMENTS for link in LINK.findall(document.read_text(encoding="utf-8"))]
    assert [(name_of(document), link) for document, link in links if not (document.parent / link).exists()] == []


def test_contributing_says_where_things_are_decided() -> None:
    rows = re.findall(
        r"^\| (.+\?) \| `(.+)` \| `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) >= 11
    for question, file, name in rows:
        defined = rf"^ *(?:def|class) {name}\b|^{name}\b.* = "
        assert re.search(defined, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), question


def github_slugs(path: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    slugs = list[str]()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        words = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading)  # of a link, its text
        slugs.append(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    return {
        slug if slugs[:place].count(slug) == 0 else f"{slug}-{slugs[:place].count(slug)}"
        for place, slug in enumerate(slugs)
    }


def test_links_to_headings_work_on_github_too() -> None:
    anchored = re.compile(r"\]\(((?!https?://)[^)\s#]*)#([^)\s]+)\)")
    lost = []
    for document in DOCUMENTS:
        for target, anchor in anchored.findall(document.read_text(encoding="utf-8")):
            page = document.parent / target if target else document
            if page.suffix == ".md" and not anchor.startswith("smoa.") and anchor not in github_slugs(page):
                lost.append(f"{name_of(document)}: {target}#{anchor}")
    assert lost == []


def nav_pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in nav_pages(one)]


def test_the_navigation_lists_every_page_once() -> None:
    listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    own = [page for page in listed if page.split("/")[0] not in GENERATED]
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert sorted([*own, *NOT_IN_NAVIGATION]) == pages
    assert [page for page in listed if not (DOCS / page).is_file()] == []


@pytest.mark.parametrize(
    ("prefix", "section"),
    [
        ("model.", ModelSection),
        ("data.", DataSection),
        ("", RunConfig),
        ("forgetting.", ForgettingSection),
        ("", Study),
        ("tuning.", Tuning),
        ("entries.NAME.", Entry),
    ],
)
def test_a_reference_page_has_every_key(prefix: str, section: type[BaseModel]) -> None:
    text = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("run-file.md", "study-file.md"))
    told = {
        key for cell in re.findall(r"^\| (`[^|]+`) \|", text, flags=re.MULTILINE) for key in re.findall("`(.+?)`", cell)
    }
    groups = {key.partition(".")[0] for key in told}
    keys = [key for key, field in section.model_fields.items() if not field.exclude]
    assert [key for key in keys if f"{prefix}{key}" not in told | groups] == []


def test_the_api_page_shows_the_settings_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "figures")
    import config_table

    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert text == config_table.page(), "run: python docs/figures/config_table.py"
    settings = {each.name for each in fields(SmoaConfig)} - {each.name for each in fields(PeftConfig)}
    assert [name for name in sorted(settings) if f"| `{name}` |" not in config_table.table()] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of mkdocs fails the build."""
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="the extra `docs` is not installed")
    config = pytest.importorskip("mkdocs.config")
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        mkdocs.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    loads = re.compile(r"""<link[^>]+href=["']?https?:|\bsrc(?:set)?=["']?https?:|url\(["']?https?:|@import""")
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > len(PAGES)
    assert [path.name for path in files if loads.search(path.read_text(encoding="utf-8"))] == []


def test_every_formula_is_drawn(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count("<math") > 50
    assert 'class="arithmatex"' not in page


def test_links_out_of_the_documents_lead_to_copies_in_the_site(site: Path) -> None:
    page = (site / "how-to" / "several-adapters.html").read_text(encoding="utf-8")
    assert 'href="../repository/examples/mixed_batch.py.txt"' in page
    assert (site / "repository" / "examples" / "mixed_batch.py.txt").is_file()
