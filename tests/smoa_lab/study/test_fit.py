"""How many steps and rounds fit into minutes. Nothing is trained, and time passes by runs alone."""

from pathlib import Path

import pytest

from smoa.errors import ConfigError
from smoa_lab.study.run_study import MARGIN, Timed, fit, work
from tests.support.studies import StudyLife, fake_time

pytestmark = pytest.mark.usefixtures("quick_pictures")


def many(folder: Path, patch: pytest.MonkeyPatch, far: float = 1.0) -> StudyLife:
    """A study of one budget and five planned rounds, whose searches start ``far`` times from the best rates."""
    rates = {"smoa": 0.01 * far, "lora": 0.002 * far}
    entries = {name: {"method": name, "learning_rate": rate} for name, rate in rates.items()}
    life = StudyLife(folder / "many", patch, entries=entries, seeds=[0, 1, 2, 3, 4])
    fake_time(patch, life.runs)
    return life


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyLife:
    return many(tmp_path, monkeypatch)


def test_a_study_lasts_as_long_as_its_searches_and_rounds_and_workers_share_it() -> None:
    timed = Timed(step=2.0, search=10.0, final=20.0, runs_of_search=4, workers=1)
    assert timed.lasts(3, 50) == pytest.approx(MARGIN * (4 * (10 + 100) + 3 * (30 + 100)))
    two = Timed(2.0, 10.0, 20.0, 4, workers=2)
    assert two.lasts(3, 50) == timed.lasts(3, 50) / 2


def test_more_time_never_gives_fewer_steps_or_rounds_and_all_fit_in_much(life: StudyLife) -> None:
    found, text = [], life.file.read_text()
    for seconds in (120, 200, 300, 400, 600, 3600):
        life.file.write_text(text)
        fit(life.file, seconds)
        found.append((len(life.study.seeds), life.study.shared["training"]["max_steps"]))
    assert found == sorted(found)
    assert found[-1] == (5, 100)
    assert found[0][0] >= 2
    assert all(steps == 100 for rounds, steps in found if rounds > 3), "three rounds come before all steps, more do not"


def test_time_that_is_too_little_for_the_smallest_comparison_is_refused_and_changes_nothing(life: StudyLife) -> None:
    before = life.file.read_text()
    with pytest.raises(ConfigError, match="--minutes: the smallest comparison"):
        fit(life.file, 20)
    assert life.file.read_text() == before
    life.edit("shared.training={use_cpu: true}")
    with pytest.raises(ConfigError, match="max_steps"):
        fit(life.file, 3600)


@pytest.mark.parametrize("seconds", [160, 320])
@pytest.mark.parametrize("far", [1.0, 0.03])
def test_a_fitted_study_ends_in_time_also_where_searches_take_longer(
    seconds: int, far: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = many(tmp_path, monkeypatch, far)
    fit(life.file, seconds)
    work(life.file, deadline=seconds)
    assert life.runs.now < seconds + 20, "what runs at the deadline is finished"
    assert {name.partition("/")[0] for name in life.named("*/*-seed-1")} == {"smoa", "lora"}


def test_what_an_interrupted_fit_left_is_thrown_away_and_steps_are_not_kept(life: StudyLife) -> None:
    for times in (1, 2):
        fit(life.file, 3600)
        assert len(life.runs.timed) == 2 * times
        assert life.named("timing") == []
        assert sum("untouched" in path for path in life.runs.ran) == 2 * times
