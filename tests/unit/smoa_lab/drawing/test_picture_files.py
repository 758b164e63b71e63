from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
from PIL import Image

from smoa_lab.drawing.look import PALETTE, values
from smoa_lab.drawing.picture_files import SCALE, save_picture


def chart() -> Any:
    shown = alt.Chart(values([{"x": 0, "y": 1}, {"x": 1, "y": 2}])).mark_line(color=PALETTE["smoa"], strokeWidth=6)
    return shown.encode(x="x:Q", y="y:Q").properties(width=100, height=50)


def test_a_picture_is_in_color_on_white_at_twice_its_size(tmp_path: Path) -> None:
    save_picture(chart(), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as saved:
        picture = saved.convert("RGB")
    assert picture.width > 100 * SCALE
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    blue = tuple(int(PALETTE["smoa"][start : start + 2], 16) for start in (1, 3, 5))
    assert blue in {color for _, color in picture.getcolors(2**16) or []}


def test_the_same_chart_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_picture(chart(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
