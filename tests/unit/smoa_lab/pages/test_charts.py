"""The palette as readers see it, with and without all kinds of cones, the encodings that use it, and pictures."""

import itertools
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pytest
from packaging.version import Version
from PIL import Image

from smoa_lab.config.methods import find_method
from smoa_lab.pages.charts import (
    DASHES,
    INK,
    METHODS,
    MUTED,
    color_of,
    colors,
    dashes,
    save_picture,
    values,
)
from tests.support.peft_versions import OF_NEWER_PEFT, installed

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def linear(color: str) -> Any:
    channels = np.array([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(color: str, sight: Any) -> Any:
    """CIE L*a*b* of the color as seen."""
    seen = np.clip(sight @ linear(color), 0, 1)
    x, y, z = np.cbrt(np.maximum(RGB_TO_XYZ @ seen / WHITE, 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    light = sorted(0.05 + RGB_TO_XYZ[1] @ linear(color) for color in (one, other))
    return float(light[1] / light[0])


def test_colors_are_of_methods_and_all_others_are_muted_and_differ_in_their_lines() -> None:
    for name in METHODS.keys() - {name for name, since in OF_NEWER_PEFT.items() if installed() < Version(since)}:
        find_method(name)
    others = {"a": "ia3", "b": "vera", "c": "a method of tomorrow"}
    assert {color_of(method) for method in others.values()} == {MUTED}
    assert dashes(others).to_dict()["scale"]["range"] == list(DASHES[:3])


@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_colors_stay_apart(sight: str) -> None:
    seen = {method: lab(color, SIGHT[sight]) for method, (_, color) in METHODS.items()}
    pairs = itertools.combinations(seen, 2)
    nearest = min(pairs, key=lambda pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])))
    assert np.linalg.norm(seen[nearest[0]] - seen[nearest[1]]) > 15, nearest


@pytest.mark.parametrize("paper", ["#ffffff", "#161616"])
def test_every_color_stands_out_from_light_and_dark_paper(paper: str) -> None:
    assert min(contrast(color, paper) for color in [*map(color_of, METHODS), MUTED]) > 1.6
    assert contrast(color_of("smoa"), paper) > 3
    assert contrast(color_of("lora"), paper) > 3


def test_entries_of_one_method_share_its_color_and_all_differ_in_their_lines() -> None:
    methods = {"smoa-k8": "smoa", "lora": "lora", "smoa-k4": "smoa"}
    assert dashes(methods).to_dict()["scale"]["range"] == list(DASHES[:3])
    scale = colors(methods).to_dict()["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == {
        "smoa-k8": color_of("smoa"),
        "lora": color_of("lora"),
        "smoa-k4": color_of("smoa"),
    }


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
