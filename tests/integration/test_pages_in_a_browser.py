"""The pages of `smoa inspect` and `smoa compare` as a browser sees them: headless Chromium, where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig
from smoa_lab.inspection.inspection_page import inspection_page
from smoa_lab.inspection.layer_reports import inspect_layers
from tests.support import lab

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`smoa inspect`'s page of one adapter."""
    folder = tmp_path_factory.mktemp("page")
    base = lab.tiny_base(folder / "base")
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj", "down_proj"], init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "adapter")
    return inspection_page("An adapter", {"ours": inspect_layers(folder / "adapter", base=str(base))})


def seen(page: str, expression: str, tmp_path: Path, *options: str) -> Any:
    """The value of a JavaScript expression in the loaded page."""
    file = tmp_path / "page.html"
    probe = f"<script>document.body.dataset.seen = JSON.stringify({expression})</script></body>"
    file.write_text(page.replace("</body>", probe), encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    start = done.stdout.index('data-seen="') + len('data-seen="')
    text = done.stdout[start : done.stdout.index('"', start)].replace("&quot;", '"').replace("&amp;", "&")
    return json.loads(text)


def test_a_heading_sorts_the_table_and_says_so_to_screen_readers(page: str, tmp_path: Path) -> None:
    script = """(() => { const table = document.querySelector('table'), heads = [...table.tHead.rows[0].cells];
      const states = [];
      for (let turn = 0; turn < 2; turn++) { heads[3].querySelector('button').click();
        states.push([heads[3].getAttribute('aria-sort'), heads[0].getAttribute('aria-sort'),
          [...table.tBodies[0].rows].map(row => Number(row.cells[3].textContent))]); }
      return states; })()"""
    (up, other, ascending), (down, _, descending) = seen(page, script, tmp_path)
    assert (up, down, other) == ("ascending", "descending", "none")
    assert ascending == sorted(ascending)
    assert descending == sorted(descending, reverse=True)
    assert len(ascending) == 4


def test_every_heading_can_be_reached_by_the_keyboard(page: str, tmp_path: Path) -> None:
    script = """[...document.querySelectorAll('th button, .wide')].map(one => { one.focus();
      return document.activeElement === one && one.tabIndex === 0; })"""
    reached = seen(page, script, tmp_path)
    assert len(reached) > 8
    assert all(reached)


def test_every_picture_has_a_text_for_screen_readers_and_the_page_a_language(page: str, tmp_path: Path) -> None:
    script = """[document.documentElement.lang, ...[...document.querySelectorAll('svg')].map(
      one => one.getAttribute('role') + ' ' + one.getAttribute('aria-label'))]"""
    language, *pictures = seen(page, script, tmp_path)
    assert language == "en"
    assert len(pictures) >= 4
    assert all(text.startswith("img ") and len(text) > 20 for text in pictures)


def test_nothing_is_fetched(page: str, tmp_path: Path) -> None:
    assert seen(page, "performance.getEntriesByType('resource').map(one => one.name)", tmp_path) == []


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_is_no_wider_than_the_window(page: str, width: int, tmp_path: Path) -> None:
    script = "[document.documentElement.scrollWidth, window.innerWidth]"
    content, window = seen(page, script, tmp_path, f"--window-size={width},800")
    assert content <= window


def test_paper_is_light_or_dark_as_the_reader_has_it(page: str, tmp_path: Path) -> None:
    script = """['light', 'dark'].map(scheme => [matchMedia(`(prefers-color-scheme: ${scheme})`).matches,
      getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg')).color])"""
    found = {}
    for scheme, setting in (("light", 1), ("dark", 0)):
        (light, paper, ink), (dark, _, _) = seen(
            page, script, tmp_path, f"--blink-settings=preferredColorScheme={setting}"
        )
        assert (light, dark) == (scheme == "light", scheme == "dark")
        found[scheme] = (paper, ink)
    assert found["light"] == ("rgb(255, 255, 255)", "rgb(27, 27, 27)")
    assert found["dark"] == ("rgb(22, 22, 22)", "rgb(232, 232, 232)")
