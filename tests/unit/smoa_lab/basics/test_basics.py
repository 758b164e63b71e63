"""What the whole lab uses: cache, names, positions, sections, and warnings of other libraries."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from pydantic import ValidationError
from transformers import BloomConfig, GPT2Config, LlamaConfig

from smoa.errors import LISTED, ConfigError, nearest
from smoa_lab.basics.cache import cache_folder, content_of, free_name
from smoa_lab.basics.foreign import foreign_warnings_ignored
from smoa_lab.basics.positions import check_positions, positions_of, prompt_room
from smoa_lab.basics.section import Section, Seed


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SMOA_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        (Unix, {"XDG_CACHE_HOME": "/cache"}, "/cache/smoa"),
        (Unix, {}, "/home/me/.cache/smoa"),
        (MacOS, {}, "/home/me/Library/Caches/smoa"),
    ],
)
def test_the_cache_is_where_smoa_0_1_had_it(
    platform: type, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SMOA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("platformdirs.PlatformDirs", platform)
    assert cache_folder() == Path(expected)


def test_a_content_is_the_same_under_another_name_and_another_one_is_not(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in "abc")
    for file, text in ((one, "text"), (same, "text"), (other, "tent")):
        file.write_text(text)
    assert content_of(one) == content_of(same) != content_of(other)


def test_only_warnings_between_other_libraries_are_silenced_and_only_within_the_block() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with foreign_warnings_ignored():
            warnings.warn("`gradient_checkpointing_enable` is deprecated and will go", FutureWarning, stacklevel=1)
            with pytest.raises(FutureWarning, match="something else"):
                warnings.warn("something else", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="gradient"):
            warnings.warn("`gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)


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


def test_more_tokens_than_positions_are_refused() -> None:
    check_positions(GPT2Config(n_positions=100), "task.max_length", 100, "questions")
    check_positions(BloomConfig(), "task.max_length", 10**6, "questions")
    with pytest.raises(
        ConfigError,
        match=r"^task\.max_length: questions of up to 1,001 tokens would be given to this model, which has 1,000 "
        r"positions; set it to 1000$",
    ):
        check_positions(GPT2Config(n_positions=1000), "task.max_length", 1001, "questions")


@pytest.mark.parametrize(("positions", "new_tokens", "room"), [(100, 24, (76, 24)), (100, 99, (50, 50))])
def test_prompt_and_answer_share_the_positions(positions: int, new_tokens: int, room: tuple[int, int]) -> None:
    assert prompt_room(GPT2Config(n_positions=positions), new_tokens) == room


def test_without_limit_a_prompt_may_be_of_any_length() -> None:
    assert prompt_room(BloomConfig(), 24) == (None, 24)


class Block(Section):
    """A block of one key."""

    key: int = 0
    seed: Seed = 0


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="unknown key; did you mean 'key'"):
        Block(kye=1)


def test_values_never_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Block(key=1).key = 2


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_one_that_every_generator_takes(seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        Block(seed=seed)
    assert Block(seed=2**32 - 1).seed == 2**32 - 1
