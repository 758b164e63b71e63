from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair as alt
import pytest
from PIL import Image

from smoa_lab.drawing.look import PALETTE, values
from smoa_lab.drawing.picture_files import SCALE, save_picture, save_pictures


def chart() -> Any:
    shown = alt.Chart(values([{"x": 0, "y": 1}, {"x": 1, "y": 2}])).mark_line(
        color=PALETTE["smoa"], strokeWidth=6, clip=True
    )
    return shown.encode(x="x:Q", y="y:Q").properties(width=100, height=50)


def test_a_picture_is_in_color_on_white_at_twice_its_size(tmp_path: Path) -> None:
    save_picture(chart(), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as saved:
        picture = saved.convert("RGB")
    assert picture.width > 100 * SCALE
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    blue = tuple(int(PALETTE["smoa"][start : start + 2], 16) for start in (1, 3, 5))
    assert blue in {color for _, color in picture.getcolors(2**16) or []}


def test_the_svg_beside_it_shows_the_same_on_white_with_text_that_can_be_searched(tmp_path: Path) -> None:
    save_pictures(chart(), tmp_path / "chart.png")
    svg = ElementTree.parse(tmp_path / "chart.svg").getroot()
    paper = svg.find("{*}rect")
    assert paper is not None
    assert (paper.get("fill"), paper.get("width")) == ("white", svg.get("width"))
    with Image.open(tmp_path / "chart.png") as saved:
        assert (saved.width, saved.height) == tuple(SCALE * float(svg.get(side, "")) for side in ("width", "height"))
    assert PALETTE["smoa"] in {line.get("stroke") for line in svg.findall(".//{*}path")}
    assert {"x", "y"} <= {text.text for text in svg.findall(".//{*}text")}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_chart_gives_the_same_bytes(ending: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_pictures(chart(), tmp_path / f"{name}.png")
    one, other = (tmp_path / f"{name}.{ending}" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
