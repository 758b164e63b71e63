from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoa_lab.training import run_folder


def test_provenance_without_git_or_a_known_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*call: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_folder.subprocess, "run", missing)
    assert run_folder._git_state() == {"commit": None, "dirty": None}
    assert run_folder._version("no-such-package") is None
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert run_folder._processor()


def test_a_processor_that_does_not_tell_its_model_is_told_by_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "processor : 0\nBogoMIPS : 50.00\n")
    monkeypatch.setattr(run_folder.platform, "processor", lambda: "aarch64")
    assert run_folder._processor() == "aarch64"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "processor : 0\nmodel name : A processor\n")
    assert run_folder._processor() == "A processor"
