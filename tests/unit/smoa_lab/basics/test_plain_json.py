from __future__ import annotations

import json
import math

import pytest

from smoa_lab.basics.plain_json import finite, json_text


def test_what_is_not_finite_becomes_none_wherever_it_is() -> None:
    values = {"loss": math.nan, "rows": [1.5, -math.inf, {"deep": (math.inf, "nan", None, True)}]}
    assert finite(values) == {"loss": None, "rows": [1.5, None, {"deep": [None, "nan", None, True]}]}


def test_the_text_is_json_that_others_can_read() -> None:
    text = json_text({"loss": math.nan, "name": "ü"})
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "name": "ü"}
    assert text == '{\n  "loss": null,\n  "name": "ü"\n}'
