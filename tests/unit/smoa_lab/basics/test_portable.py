from __future__ import annotations

from smoa_lab.basics.portable import portable


def test_of_absolute_paths_only_the_last_name_is_left() -> None:
    values = {"name": "/home/me/base", "files": {"mine": ["~/data/train.jsonl", "C:\\data\\test.csv"]}}
    assert portable(values) == {"name": "base", "files": {"mine": ["train.jsonl", "test.csv"]}}


def test_everything_else_stays() -> None:
    values = {
        "name": "org/base",
        "folder": "runs/demo",
        "rates": [1e-3, None, True],
        "pattern": r".*\.q_proj",
        "~": "~",
    }
    assert portable(values) == values
