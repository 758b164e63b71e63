from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smoa.errors import DataError
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.crews import ray_worker
from smoa_lab.study.crews.ray_worker import Place, perform
from smoa_lab.study.plan import Untouched
from smoa_lab.study.study_file import Study
from tests.support.threads import threads


def test_a_machine_that_does_not_share_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place(str(tmp_path), Path("study/work/driver-1"))
    monkeypatch.setattr("socket.gethostname", lambda: "machine-7")
    with pytest.raises(DataError, match=r"study: machine-7 does not see what other machines write there; all"):
        place.enter()
    (tmp_path / "study" / "work").mkdir(parents=True)
    (tmp_path / "study" / "work" / "driver-1").touch()
    place.enter()
    with pytest.raises(DataError, match="must share this folder, and /no/such/place, under the same path"):
        Place("/no/such/place", place.mark).enter()


def test_a_worker_keeps_a_study_that_it_has_begun(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_worker, "_begun", {})
    used: list[tuple[Comparison, int]] = []
    monkeypatch.setattr(Comparison, "perform", lambda self, job: used.append((self, torch.get_num_threads())) or {})
    mark = tmp_path / "mark"
    mark.touch()
    with threads(torch.get_num_threads()):
        for number in (1, 2):
            perform(study, Place(str(tmp_path), mark), Untouched(), number)
    (first, one), (second, two) = used
    assert first is second
    assert (one, two) == (1, 2)
