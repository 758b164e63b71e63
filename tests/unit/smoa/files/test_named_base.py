from __future__ import annotations

from pathlib import Path

import pytest

from smoa.files.card import NamedBase, named_base


def test_a_hub_id_is_a_name_and_a_link() -> None:
    assert named_base("org/base") == NamedBase("org/base", "org/base")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("/home/me/models/base", "base"),
        ("~/models/base/", "base"),
        ("./base", "base"),
        ("models/mine/base", "base"),
        ("C:\\models\\base", "base"),
        ("/models/tiny.gguf", "tiny.gguf"),
        ("models/tiny.gguf", "tiny.gguf"),
    ],
)
def test_of_a_local_base_only_the_last_name_is_told(source: str, text: str) -> None:
    assert named_base(source) == NamedBase(text, None)


def test_a_folder_that_exists_is_local_even_if_it_looks_like_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert named_base("org/base") == NamedBase("base", None)


def test_a_model_without_a_name_is_called_so() -> None:
    assert named_base(None) == named_base("") == NamedBase("a model without a name", None)
