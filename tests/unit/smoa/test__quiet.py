"""What libraries say while they are imported stays out of what the command prints, and nothing else does."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest

import smoa  # noqa: F401  (which installs the filters)
from smoa._quiet import IMPORT_NOTES


@pytest.mark.parametrize(
    ("modules", "argv", "dropped"),
    [
        (["smoa_lab"], ["train.py"], True),
        ([], ["-m", "data"], True),  # while Python looks for the __main__ of `python -m smoa`
        ([], ["train.py"], False),
    ],
    ids=["the lab", "python -m smoa", "a program that only uses the library"],
)
def test_only_the_known_notes_are_dropped_and_only_in_the_lab(
    modules: list[str], argv: list[str], dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "smoa_lab", raising=False)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys, "argv", argv)
    for name, note in IMPORT_NOTES.items():
        logger = logging.getLogger(name)
        texts = [f"{note}: an end that changes", f"{name} has news"]
        shown = [bool(logger.filter(logger.makeRecord(name, logging.INFO, "", 1, text, (), None))) for text in texts]
        assert shown == [not dropped, True]
