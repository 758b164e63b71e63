from __future__ import annotations

import json
import math
import re
from pathlib import Path

import altair as alt
import pytest

from smoa_lab.drawing.look import PAPER, values
from smoa_lab.drawing.pages import anchor, code, figure, link, page, section, table, write_page


def test_a_chart_is_on_the_page_as_data_with_its_caption_in_words() -> None:
    chart = alt.Chart(values([{"x": "</script>"}])).mark_point(fill=PAPER).encode(x="x:N")
    text = figure(chart, "What <it> shows")
    assert "<figcaption>What &lt;it&gt; shows</figcaption>" in text
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    drawn = json.loads(data)
    assert drawn["description"] == "What <it> shows"
    assert drawn["mark"]["fill"] == "var(--paper, white)"
    assert "</script>" in str(drawn["datasets"])


def test_a_chart_of_what_is_no_number_is_json_that_browsers_can_read() -> None:
    text = figure(alt.Chart(values([{"x": math.nan}, {"x": 1.5}])).mark_point().encode(x="x:Q"), "Caption")
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    (points,) = json.loads(data, parse_constant=pytest.fail)["datasets"].values()
    assert points == [{"x": None}, {"x": 1.5}]


@pytest.mark.parametrize("name", ["<!--<script>", "<img src=x onerror=alert(1)>"])
def test_a_name_in_a_chart_neither_opens_nor_closes_an_element(name: str) -> None:
    text = figure(alt.Chart(values([{"x": name}])).mark_point().encode(x="x:N"), name)
    assert name not in text
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert [one["x"] for rows in json.loads(data)["datasets"].values() for one in rows] == [name]


def test_text_that_looks_like_html_is_text_wherever_it_stands() -> None:
    name = "<b>x</b>"
    cells = table(name, [name], [[name], [(name, name)], [anchor(name)], [link(name, name)]])
    text = page(name, section(name, cells, name), name)
    assert name not in text
    assert text.count("<td>&lt;b&gt;x&lt;/b&gt;</td>") == 1
    assert '<td><a href="&lt;b' in text
    assert '<td><span id="&lt;b' in text


def test_text_is_escaped() -> None:
    assert "a &lt; b" in code("a < b")
    assert "<title>a &lt; b</title>" in page("a < b")


def test_the_script_is_laid_beside_the_page(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page("Empty"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["charts.js", "page.html"]
    assert '<script src="charts.js"></script>' in (tmp_path / "page.html").read_text()
    assert '<script src="../charts.js"></script>' in page("Empty", script="../charts.js")
