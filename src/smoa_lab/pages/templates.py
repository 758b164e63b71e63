"""HTML and Markdown from the jinja2 templates of this folder. Pages work offline: light and dark, fit for print, with
charts and sortable tables that a keyboard reaches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from smoa.atomic import write_whole
from smoa_lab.basics.plain import finite

SCRIPT = "charts.js"
"""Draws the charts. It lies beside the pages that need it."""


def page(
    title: str,
    sections: Iterable[tuple[str, Sequence[Any]]] = (),
    introduction: Sequence[Any] = (),
    script: str = SCRIPT,
) -> str:
    """A whole page: the ``introduction``, then sections under headings. Both hold texts, which are paragraphs, tables,
    figures, :func:`code`, and texts by name. ``script`` leads to the script that draws charts."""
    values = {"title": title, "sections": sections, "introduction": introduction, "script": script}
    return render("page.html.jinja", **values)


def render(template: str, **values: Any) -> str:
    """The template of this name with its values. In HTML all text is escaped but tables, figures and markup."""
    return _environment().get_template(template).render(values)


def code(text: str) -> Markup:
    """Text as it was written, in a typewriter's letters."""
    return Markup('<pre class="wide" tabindex="0">{}</pre>').format(text)


def warning(text: str) -> Markup:
    """What is missing or wrong."""
    return Markup('<p class="missing">{}</p>').format(text)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("smoa_lab", "pages"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@dataclass(frozen=True)
class Figure:
    """A chart on a page, whose text takes the page's color; ``caption`` is its text for screen readers too."""

    chart: Any
    caption: str

    @property
    def json(self) -> Markup:
        """The chart as Vega-Lite."""
        from smoa_lab.pages.charts import PAPER, specification

        chart = finite({**specification(self.chart), "description": self.caption})
        text = json.dumps(chart, ensure_ascii=False, separators=(",", ":"))
        text = text.replace(json.dumps(PAPER), '"var(--paper, white)"')
        return Markup(text.replace("<", "\\u003c"))  # no <!--, no </script>

    def __html__(self) -> str:
        return render("figure.html.jinja", figure=self)


def write_page(file: Path, text: str) -> None:
    """Write a page and, beside it, the script that draws its charts."""
    beside = file.with_name(SCRIPT)
    if not beside.is_file() or beside.read_text(encoding="utf-8") != script():
        write_whole(beside, script())
    write_whole(file, text)


@cache
def script() -> str:
    """The script that draws charts: Vega, as the package vl-convert has it. It fetches nothing."""
    import vl_convert

    from smoa_lab.pages.charts import vega_lite_version

    drawing = (files("smoa_lab.pages") / SCRIPT).read_text(encoding="utf-8")
    bundled: str = vl_convert.javascript_bundle(drawing, vl_version=vega_lite_version())
    return bundled
