"""HTML pages that work offline: light and dark, charts and sortable tables that a keyboard reaches, fit for print."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoa.atomic import write_whole
from smoa_lab.basics.plain_json import finite
from smoa_lab.drawing.chart_script import SCRIPT, lay_script
from smoa_lab.drawing.look import PAPER, specification

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #bbb; --soft: #f2f2f2; --link: #0b57d0;
  --warn: #a33; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --line: #555; --soft: #242424;
  --link: #8ab4f8; --warn: #f99; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
a { color: var(--link); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding-bottom: .5rem; } caption span { display: block; max-width: 55rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover, tr:has(:target) { background: var(--soft); }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button:focus-visible, a:focus-visible, .wide:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.wide { overflow-x: auto; } figure { margin: 0 0 1.5rem; } figcaption { max-width: 45rem; font-size: .9rem; }
.chart.vega-embed { display: block; padding: 1.75rem 0 0; } .chart [role=link] { cursor: pointer; }
.chart { max-width: 60rem; } .chart .marks { width: 100%; height: auto; }
.chart [role=link]:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
#vg-tooltip-element.vg-tooltip { color: var(--ink); background: var(--paper); border-color: var(--line); }
#vg-tooltip-element.vg-tooltip table tr td.key { color: inherit; opacity: .7; }
pre { background: var(--soft); padding: .6rem .8rem; font-size: .85rem; white-space: pre-wrap; }
dt { font-weight: bold; font-size: .85rem; } dd { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { border-left: 3px solid var(--line); padding-left: .8rem; margin: 1rem 0; } .missing { color: var(--warn); }
@media print { body { max-width: none; margin: 0; color: #000; background: #fff; } summary { display: none; }
  .wide { overflow: visible; } table { font-size: .7rem; } figure, tr { break-inside: avoid; } }
"""
# Sorts by data-value where a cell has one, else by its text; numbers as numbers.
SORTING = """
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.closest('th'), table = head.closest('table'), column = head.cellIndex;
  const up = head.getAttribute('aria-sort') !== 'ascending';
  const key = row => { const cell = row.cells[column], value = cell.dataset.value ?? cell.textContent.trim();
    return value !== '' && !isNaN(value) ? Number(value) : value; };
  const order = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b));
  const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)) * (up ? 1 : -1));
  for (const other of table.querySelectorAll('th')) other.setAttribute('aria-sort', 'none');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  table.tBodies[0].append(...rows);
});
"""


class Html(str):
    """Text that is HTML already. All other text is escaped, whatever it looks like."""

    __slots__ = ()


def write_page(file: Path, text: str) -> None:
    """Write a page and, beside it, the script that draws its charts."""
    lay_script(file.parent)
    write_whole(file, text)


def page(title: str, *parts: str, script: str = SCRIPT) -> Html:
    """The whole document. ``script`` leads to the script that draws charts."""
    heading = html.escape(title)
    return Html(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{heading}</h1>\n"
        + "\n".join(map(_escaped, parts))
        + f'\n</main>\n<script>{SORTING}</script>\n<script src="{script}"></script>\n</body>\n</html>\n'
    )


def paragraph(text: str) -> Html:
    """A paragraph of plain text."""
    return Html(f"<p>{html.escape(text)}</p>")


def code(text: str) -> Html:
    """Text as it was written, in a typewriter's letters."""
    return Html(f'<pre class="wide" tabindex="0">{html.escape(text)}</pre>')


def section(title: str, *parts: str) -> Html:
    """A heading and what is under it."""
    return Html(f"<section>\n<h2>{html.escape(title)}</h2>\n" + "\n".join(map(_escaped, parts)) + "\n</section>")


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    """A sortable table. A cell is text, HTML, a number, or (shown, value to sort by)."""
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{html.escape(name)}</button></th>' for name in header
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return Html(
        f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(caption)}">\n<table>\n'
        f"<caption><span>{html.escape(caption)}</span></caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        "</table>\n</div>"
    )


def figure(chart: Any, caption: str) -> Html:
    """A chart, whose text takes the page's color; ``caption`` is its text for screen readers too."""
    told = finite({**specification(chart), "description": caption})
    drawn = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    drawn = drawn.replace(json.dumps(PAPER), '"var(--paper, white)"').replace("<", "\\u003c")  # no <!--, no </script>
    return Html(
        f'<figure data-chart>\n<div class="chart wide" tabindex="0">This chart is drawn by {SCRIPT}, which lies beside '
        f"this page.</div>\n<figcaption>{html.escape(caption)}</figcaption>\n"
        f'<script type="application/json">{drawn}</script>\n</figure>'
    )


def link(address: str, text: str) -> Html:
    """A link."""
    return Html(f'<a href="{html.escape(address)}">{html.escape(text)}</a>')


def anchor(name: str) -> Html:
    """A name that links on the page lead to as ``#name``."""
    return Html(f'<span id="{html.escape(name)}">{html.escape(name)}</span>')


def _cell(content: Any) -> str:
    if isinstance(content, tuple):
        shown, value = content
        return f'<td data-value="{html.escape(str(value))}">{_escaped(shown)}</td>'
    return f"<td>{_escaped(content)}</td>"


def _escaped(content: Any) -> str:
    return content if isinstance(content, Html) else html.escape(str(content))
