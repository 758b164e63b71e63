"""HTML and Markdown from the jinja2 templates of this folder. A page is one file that works offline: light and
dark, fit for print, with charts and with tables that a keyboard sorts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from smoa_lab.basics.plain import finite


def page(title: str, sections: Iterable[tuple[str, Sequence[Any]]] = (), introduction: Sequence[Any] = ()) -> str:
    """A whole page: the ``introduction``, then sections under headings. Both hold texts, which are paragraphs, tables,
    figures, :func:`code`, and texts by name."""
    return render("page.html.jinja", title=title, sections=sections, introduction=introduction, script=_script())


def render(template: str, **values: Any) -> str:
    """The template of this name with its values. In HTML all text is escaped but tables, figures and markup."""
    return _environment().get_template(template).render(values)


def code(text: str) -> Markup:
    """Text as it was written, in a typewriter's letters."""
    return Markup('<pre class="wide" tabindex="0">{}</pre>').format(text)


def commands(text: str) -> Markup:
    """Text with what stands in backticks as code."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", escape(text)))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("smoa_lab", "pages"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["commands"] = commands
    return environment


@dataclass(frozen=True)
class Figure:
    """A chart on a page, whose text takes the page's color; ``caption`` is its text for screen readers too."""

    chart: Any
    caption: str

    @property
    def json(self) -> Markup:
        """The chart as Vega-Lite."""
        from smoa_lab.pages.charts import PAPER

        chart = finite({**self.chart.to_dict(), "background": None, "description": self.caption})
        text = json.dumps(chart, ensure_ascii=False, separators=(",", ":"))
        text = text.replace(json.dumps(PAPER), '"var(--paper, white)"')
        return Markup(text.replace("<", "\\u003c"))  # no <!--, no </script>

    def __html__(self) -> str:
        return render("figure.html.jinja", figure=self)


@cache
def _script() -> Markup:
    """What draws charts and sorts tables, with Vega as the package vl-convert has it. It fetches nothing."""
    import vl_convert

    own = (files("smoa_lab.pages") / "page.js").read_text(encoding="utf-8")
    return Markup(vl_convert.javascript_bundle(own))
