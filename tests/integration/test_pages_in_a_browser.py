"""The pages of `smoa inspect` and `smoa report` as a browser sees them: headless Chromium, where it is
installed."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig
from smoa_lab.inspect import inspect_layers
from smoa_lab.inspect_page import inspection_page
from smoa_lab.run_page import report_run
from tests.support import lab
from tests.support.runs import stored_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"),
    "--virtual-time-budget=5000",
)
KINDS = ("inspect", "report")
# Waits until all charts are drawn, then keeps what an expression gives for the test.
PROBE = """<script>(async () => {
  const drawn = () => [...document.querySelectorAll('.chart')].every(one => 'drawn' in one.dataset);
  while (!drawn()) await new Promise(done => setTimeout(done, 20));
  document.body.dataset.seen = JSON.stringify(await (%s));
})()</script></body>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    base = lab.tiny_base(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj"]
    for config in (
        SmoaConfig(r=4, num_blocks=2, target_modules=targets, init_weights=False),
        LoraConfig(r=2, target_modules=targets, init_lora_weights=False),
    ):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(folder / config.peft_type.value)
    adapters = {name: inspect_layers(folder / name, base=str(base)) for name in ("SMOA", "LORA")}
    (folder / "inspect.html").write_text(inspection_page("Adapters", adapters), encoding="utf-8")
    run = report_run(stored_run(folder / "run"))
    return {"inspect": folder / "inspect.html", "report": run}


def seen(page: Path, expression: str, tmp_path: Path, *options: str) -> Any:
    """The value of a JavaScript expression in the page, once it is drawn."""
    file = tmp_path / "page.html"
    before, _, after = page.read_text(encoding="utf-8").rpartition("</body>")
    file.write_text(f"{before}{PROBE % expression}{after}", encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    start = done.stdout.index('data-seen="') + len('data-seen="')
    text = done.stdout[start : done.stdout.index('"', start)].replace("&quot;", '"').replace("&amp;", "&")
    return json.loads(text)


def test_a_heading_sorts_the_table_and_says_so_to_screen_readers(pages: dict[str, Path], tmp_path: Path) -> None:
    script = """(() => { const table = document.querySelector('table'), heads = [...table.tHead.rows[0].cells];
      const states = [];
      for (let turn = 0; turn < 2; turn++) { heads[3].querySelector('button').click();
        states.push([heads[3].getAttribute('aria-sort'), heads[0].getAttribute('aria-sort'),
          [...table.tBodies[0].rows].map(row => Number(row.cells[3].textContent.replace('! ', '')))]); }
      return states; })()"""
    (up, other, ascending), (down, _, descending) = seen(pages["inspect"], script, tmp_path)
    assert (up, down, other) == ("ascending", "descending", "none")
    assert ascending == sorted(ascending)
    assert descending == sorted(descending, reverse=True)
    assert len(ascending) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_its_window_is_for_keyboards_and_screen_readers_and_fetches_nothing(
    kind: str, pages: dict[str, Path], tmp_path: Path
) -> None:
    script = """(() => { const charts = [...document.querySelectorAll('.chart')];
      const told = (one, name) => one.getAttribute(name)
        ?? one.querySelector('[role=graphics-document]')?.getAttribute(name);
      const stops = [...document.querySelectorAll('th button, .wide')];
      return {
        language: document.documentElement.lang,
        charts: charts.map(one => [told(one, 'role'), told(one, 'aria-label')]),
        reached: stops.map(one => { one.focus(); return document.activeElement === one && one.tabIndex === 0; }),
        fetched: performance.getEntriesByType('resource').map(one => one.name),
        widths: [document.documentElement.scrollWidth, window.innerWidth],
      }; })()"""
    found = seen(pages[kind], script, tmp_path, "--window-size=500,800")
    assert found["language"] == "en"
    assert found["charts"]
    assert all(role == "graphics-document" and len(text) > 10 for role, text in found["charts"])
    assert len(found["reached"]) > 5
    assert all(found["reached"])
    assert found["fetched"] == []
    content, window = found["widths"]
    assert content <= window


def test_paper_and_ink_are_light_or_dark_as_the_reader_has_it(pages: dict[str, Path], tmp_path: Path) -> None:
    script = """['light', 'dark'].map(scheme => [matchMedia(`(prefers-color-scheme: ${scheme})`).matches,
      getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.marks text')).fill])"""
    found = {}
    for scheme, setting in (("light", 1), ("dark", 0)):
        (light, paper, ink), (dark, _, _) = seen(
            pages["report"], script, tmp_path, f"--blink-settings=preferredColorScheme={setting}"
        )
        assert (light, dark) == (scheme == "light", scheme == "dark")
        found[scheme] = (paper, ink)
    assert found["light"] == ("rgb(255, 255, 255)", "rgb(27, 27, 27)")
    assert found["dark"] == ("rgb(22, 22, 22)", "rgb(232, 232, 232)")
