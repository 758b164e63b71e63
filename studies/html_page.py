"""HTML from the jinja2 templates beside this file. A page is one file that works offline: light and dark, fit for
print, with charts and with tables that a keyboard sorts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from smoa_lab.basics.values import finite
from smoa_lab.pages.charts import PAPER


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text: sorted by another ``value``, a place that links lead to by the text
    (``anchor``), or several texts with the addresses that they link to."""

    text: str
    value: float | str | None = None
    anchor: bool = False
    links: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SortedTable:
    """Rows under a header that sorts them. A cell is a :class:`Cell`, or what ``str`` makes text of."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]

    def __html__(self) -> str:
        return render("table.html.jinja", table=self)


@dataclass(frozen=True)
class Figure:
    """A chart on a page, whose text takes the page's color; ``caption`` is its text for screen readers too."""

    chart: Any
    caption: str

    @property
    def json(self) -> Markup:
        """The chart as Vega-Lite."""
        chart = finite({**self.chart.to_dict(), "background": None, "description": self.caption})
        text = json.dumps(chart, ensure_ascii=False, separators=(",", ":"))
        text = text.replace(json.dumps(PAPER), '"var(--paper, white)"')
        return Markup(text.replace("<", "\\u003c"))  # no <!--, no </script>

    def __html__(self) -> str:
        return render("figure.html.jinja", figure=self)


def page(title: str, sections: Iterable[tuple[str, Sequence[Any]]] = (), introduction: Sequence[Any] = ()) -> str:
    """A whole page: the ``introduction``, then sections under headings. Both hold texts, which are paragraphs, tables,
    figures, and texts by name."""
    return render("page.html.jinja", title=title, sections=sections, introduction=introduction, script=_script())


def render(template: str, **values: Any) -> str:
    """The template of this name with its values. All text is escaped but tables, figures and markup."""
    return _environment().get_template(template).render(values)


def commands(text: str) -> Markup:
    """Text with what stands in backticks as code."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", escape(text)))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["commands"] = commands
    return environment


@cache
def _script() -> Markup:
    """What draws charts and sorts tables, with Vega as the package vl-convert has it. It fetches nothing."""
    import vl_convert

    return Markup(vl_convert.javascript_bundle(Path(__file__).with_name("page.js").read_text(encoding="utf-8")))
