"""What the whole lab uses: cache, names, positions, sections, and warnings of other libraries."""

import importlib
import json
import math
import warnings
from pathlib import Path

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig

import smoa_lab
from smoa.errors import LISTED, nearest
from smoa_lab.base_models import positions_of
from smoa_lab.basics.cache import cache_folder, free_name
from smoa_lab.basics.plain import finite, json_text, portable


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SMOA_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_only_warnings_between_other_libraries_are_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(smoa_lab)
        for name in ("gradient_checkpointing_enable", "is_gradient_checkpointing"):
            warnings.warn(f"`{name}` is deprecated and will go", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="something else"):
            warnings.warn("something else", FutureWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("taken", "found"),
    [(set(), "run"), ({"run"}, "run-2"), ({"run", "run-2", "run-4"}, "run-3"), ({"run-2"}, "run")],
)
def test_the_first_free_name_is_taken(taken: set[str], found: str) -> None:
    assert free_name("run", taken.__contains__) == found


def test_a_name_like_none_is_answered_with_all_where_they_are_few() -> None:
    few, many = ["one", "two"], [f"name{i}" for i in range(LISTED + 1)]
    assert nearest("zzz", few) == "; choose from one, two"
    assert nearest("zzz", many) == nearest("zzz", []) == ""
    assert nearest("nam3", many).endswith("did you mean 'name3'?")


def test_positions_are_the_configs_own_or_not_limited() -> None:
    assert positions_of(GPT2Config(n_positions=100)) == 100
    assert positions_of(LlamaConfig(max_position_embeddings=100)) == 100
    assert positions_of(BloomConfig()) is None


def test_what_is_not_finite_becomes_none_wherever_it_is() -> None:
    values = {"loss": math.nan, "rows": [1.5, -math.inf, {"deep": (math.inf, "nan", None, True)}]}
    assert finite(values) == {"loss": None, "rows": [1.5, None, {"deep": [None, "nan", None, True]}]}


def test_the_text_is_json_that_others_can_read() -> None:
    text = json_text({"loss": math.nan, "name": "ü"})
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "name": "ü"}
    assert text == '{\n  "loss": null,\n  "name": "ü"\n}'


def test_of_absolute_paths_only_the_last_name_is_left() -> None:
    values = {"name": "/home/me/base", "files": {"mine": ["~/data/train.jsonl", "C:\\data\\test.csv"]}}
    assert portable(values) == {"name": "base", "files": {"mine": ["train.jsonl", "test.csv"]}}
