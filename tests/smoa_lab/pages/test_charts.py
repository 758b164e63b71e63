"""The palette as readers see it, with and without all kinds of cones, the encodings that use it, and pictures."""

from pathlib import Path
from typing import Any

import altair as alt
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from PIL import Image

from smoa_lab.config.methods import find_method
from smoa_lab.pages.charts import (
    DASHES,
    INK,
    METHODS,
    MUTED,
    color_of,
    dashes,
    save_picture,
    values,
)

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.


def test_colors_are_of_methods_and_all_others_are_muted_and_differ_in_their_lines() -> None:
    of_newer_peft = {"gralora", "hira"} - {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    for name in METHODS.keys() - of_newer_peft:
        find_method(name)
    others = {"a": "ia3", "b": "vera", "c": "a method of tomorrow"}
    assert {color_of(method) for method in others.values()} == {MUTED}
    assert dashes(others).to_dict()["scale"]["range"] == list(DASHES[:3])


def test_text_takes_the_color_of_the_page() -> None:
    chart = alt.Chart(values([{"x": 1}])).mark_point().encode(x="x:Q")
    config = chart.to_dict()["config"]
    assert config["axis"]["labelColor"] == config["title"]["color"] == config["text"]["color"] == INK == "currentColor"


def chart() -> Any:
    shown = alt.Chart(values([{"x": 0, "y": 1}, {"x": 1, "y": 2}])).mark_line(
        color=color_of("smoa"), strokeWidth=6, clip=True
    )
    return shown.encode(x="x:Q", y="y:Q").properties(width=100, height=50)


def test_a_picture_is_in_color_on_white_at_twice_its_size(tmp_path: Path) -> None:
    save_picture(chart(), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as saved:
        size, picture = saved.size, saved.convert("RGB")
    assert size[0] > 200
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    blue = tuple(int(color_of("smoa")[start : start + 2], 16) for start in (1, 3, 5))
    assert blue in {color for _, color in picture.getcolors(2**16) or []}
    save_picture(chart(), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "chart.png").read_bytes()
