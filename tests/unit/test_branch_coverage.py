from __future__ import annotations

from typing import Any

import pytest

from tests import branch_coverage
from tests.branch_coverage import count, main


def report(library: int, lab: int) -> dict[str, Any]:
    """Of so many branches taken of 50 and 100."""
    numbers = {
        "src/smoa/layer.py": (library, 40),
        "src/smoa/spectrum.py": (10, 10),
        "src/smoa/experiments/comparison/rows.py": (lab, 100),
    }
    return {
        "files": {
            name: {"summary": {"covered_branches": taken, "num_branches": total}}
            for name, (taken, total) in numbers.items()
        }
    }


def test_library_and_lab_are_counted_apart() -> None:
    taken, total = count(report(library=38, lab=90)["files"])
    assert taken == {"library": 48, "lab": 90}
    assert total == {"library": 50, "lab": 100}


def test_enough_branches_pass_and_one_less_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(branch_coverage, "last_report", lambda: report(library=38, lab=95))
    main()
    assert "143 of 150 (95.3%); library 48 of 50 (96.0%), lab 95 of 100 (95.0%)" in capsys.readouterr().out
    monkeypatch.setattr(branch_coverage, "last_report", lambda: report(library=38, lab=94))
    with pytest.raises(SystemExit, match="fewer than 95% of the branches are tested"):
        main()
