"""The palette as readers see it, with and without all kinds of cones, and the encodings that use it."""

from __future__ import annotations

import itertools
from typing import Any

import altair as alt
import numpy as np
import pytest

from smoa_lab.config.methods import METHODS
from smoa_lab.drawing.look import DASHES, INK, MUTED, PALETTE, color_of, colors, dash_of, shapes, specification, values

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


def test_every_method_has_a_color_and_others_are_muted() -> None:
    assert PALETTE.keys() == METHODS.keys()
    assert color_of("a method of tomorrow") == MUTED


@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_colors_stay_apart(sight: str) -> None:
    seen = {method: lab(color, SIGHT[sight]) for method, color in PALETTE.items()}
    pairs = itertools.combinations(seen, 2)
    nearest = min(pairs, key=lambda pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])))
    assert np.linalg.norm(seen[nearest[0]] - seen[nearest[1]]) > 15, nearest


@pytest.mark.parametrize("paper", ["#ffffff", "#161616"])
def test_every_color_stands_out_from_light_and_dark_paper(paper: str) -> None:
    assert min(contrast(color, paper) for color in [*PALETTE.values(), MUTED]) > 1.6
    assert contrast(PALETTE["smoa"], paper) > 3
    assert contrast(PALETTE["lora"], paper) > 3


def test_entries_of_one_method_share_its_color_and_differ_in_their_lines() -> None:
    methods = {"smoa-k8": "smoa", "lora": "lora", "smoa-k4": "smoa"}
    assert dash_of(methods) == {"smoa-k8": DASHES[0], "lora": DASHES[0], "smoa-k4": DASHES[1]}
    assert shapes(methods).to_dict()["scale"]["range"] == ["circle", "circle", "square"]
    scale = colors(methods).to_dict()["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == {
        "smoa-k8": PALETTE["smoa"],
        "lora": PALETTE["lora"],
        "smoa-k4": PALETTE["smoa"],
    }


def test_text_takes_the_color_of_the_page() -> None:
    chart = alt.Chart(values([{"x": 1}])).mark_point().encode(x="x:Q")
    config = specification(chart)["config"]
    assert config["axis"]["labelColor"] == config["title"]["color"] == config["text"]["color"] == INK == "currentColor"
