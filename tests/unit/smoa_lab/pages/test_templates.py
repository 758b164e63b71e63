"""Figures, tables and pages as HTML, and the script that lies beside them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import altair as alt
import pytest

from smoa_lab.pages import templates
from smoa_lab.pages.charts import PAPER, values
from smoa_lab.pages.tables import Cell, Table
from smoa_lab.pages.templates import SCRIPT, Figure, code, page, script, warning, write_page


def drawn(value: Any, caption: str) -> tuple[str, dict[str, Any]]:
    """A figure as HTML, and the chart in it."""
    text = Figure(alt.Chart(values([{"x": value}])).mark_point(fill=PAPER).encode(x="x:N"), caption).__html__()
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data, parse_constant=pytest.fail)


@pytest.mark.parametrize("name", ["</script>", "<!--<script>", "<img src=x onerror=alert(1)>"])
def test_a_chart_is_on_the_page_as_data_with_its_caption_in_words(name: str) -> None:
    text, chart = drawn(name, name)
    assert name not in text.replace("</script>\n</figure>", "")
    assert chart["description"] == name
    assert chart["mark"]["fill"] == "var(--paper, white)"
    assert list(chart["datasets"].values()) == [[{"x": name}]]


def test_a_chart_of_what_is_no_number_is_json_that_browsers_can_read() -> None:
    assert list(drawn(math.nan, "Caption")[1]["datasets"].values()) == [[{"x": None}]]


def test_text_that_looks_like_html_is_text_wherever_it_stands() -> None:
    name = "<b>x</b>"
    row = [name, Cell(name, value=name), Cell(name, anchor=True), Cell(name, links={name: name})]
    table = Table([name], [row], name)
    text = page(name, [(name, [name, table, code(name), {name: name}])], [warning(name)])
    assert name not in text
    assert text.count("<td>&lt;b&gt;x&lt;/b&gt;</td>") == 1
    assert '<td data-value="&lt;b' in text
    assert '<td><a href="&lt;b' in text
    assert '<td><span id="&lt;b' in text


def test_the_script_is_one_file_that_imports_nothing() -> None:
    text = script()
    assert len(text) < 1_000_000
    assert not any(line.startswith(("import ", "export ")) for line in text.splitlines())
    assert "figure[data-chart]" in text


def test_the_script_is_laid_beside_the_page_unless_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SCRIPT).write_text("of another version")
    write_page(tmp_path / "page.html", page("Empty"))
    assert (tmp_path / SCRIPT).read_text(encoding="utf-8") == script()
    assert '<script src="charts.js"></script>' in (tmp_path / "page.html").read_text()
    assert '<script src="../charts.js"></script>' in page("Empty", script="../charts.js")
    monkeypatch.setattr(templates, "write_whole", lambda file, text: file.name == SCRIPT and pytest.fail("again"))
    write_page(tmp_path / "page.html", "")
