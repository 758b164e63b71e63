"""Writes the table of SmoaConfig's settings on docs/api.md from the class: python docs/figures/config_table.py."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

from smoa import SmoaConfig
from smoa_lab.basics.files import write_whole
from smoa_lab.pages.tables import Table

PAGE = Path(__file__).parents[1] / "api.md"
PLACE = re.compile(r"(<!-- begin config -->\n).*?(<!-- end config -->)", re.DOTALL)
SETTING = re.compile(r"^    (\w+): (.+(?:\n        .+)*)", re.MULTILINE)


def table() -> str:
    """A row for each setting that the class documents, with its default."""
    told = inspect.getdoc(SmoaConfig) or ""
    defaults = {
        each.name: each.default_factory() if each.default_factory is not MISSING else each.default
        for each in fields(SmoaConfig)
    }
    rows = [
        [f"`{name}`", f"`{defaults.get(name)!r}`", " ".join(text.split()).replace("|", "\\|")]
        for name, text in SETTING.findall(told.partition("Args:")[2].partition("Raises:")[0])
    ]
    return Table(["setting", "default", ""], rows).markdown(["---"] * 3)


def page() -> str:
    """The page with today's table."""
    return PLACE.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    write_whole(PAGE, page())
