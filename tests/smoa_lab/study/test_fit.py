"""How many steps and rounds fit into minutes. Nothing is trained, and time passes by runs alone."""

from itertools import product
from pathlib import Path

import pytest

from smoa.errors import ConfigError
from smoa_lab.study.fit import MARGIN, Timed, fit
from smoa_lab.study.run_study import work
from smoa_lab.study.study import edit, load_study
from tests.support.studies import WrittenRuns, fake_time, finished, tiny_study

pytestmark = pytest.mark.usefixtures("quick_pictures")


@pytest.fixture
def many(tmp_path: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of one budget and five planned rounds."""
    fake_time(monkeypatch, written)
    entries = {name: {"method": name, "learning_rate": rate} for name, rate in (("smoa", 0.01), ("lora", 0.002))}
    return tiny_study(tmp_path / "many", entries=entries, seeds=[0, 1, 2, 3, 4])


def test_a_study_lasts_as_long_as_its_searches_and_rounds_and_workers_share_it() -> None:
    timed = Timed(step=2.0, search=10.0, final=20.0, runs_of_search=4, workers=1)
    assert timed.lasts(3, 50) == pytest.approx(MARGIN * (4 * (10 + 100) + 3 * (30 + 100)))
    two = Timed(2.0, 10.0, 20.0, 4, workers=2)
    assert two.lasts(3, 50) == timed.lasts(3, 50) / 2


def test_more_time_never_gives_fewer_steps_or_rounds_and_all_fit_in_much(many: Path) -> None:
    found, text = [], many.read_text()
    for seconds in (120, 200, 300, 400, 600, 3600):
        many.write_text(text)
        fit(many, seconds)
        study = load_study(many)
        found.append((len(study.seeds), study.shared["training"]["max_steps"]))
    assert found == sorted(found)
    assert found[-1] == (5, 100)
    assert found[0][0] >= 2
    assert all(rounds > 3 or steps <= 100 for rounds, steps in found)
    assert all(steps == 100 for rounds, steps in found if rounds > 3), "three rounds come before all steps, more do not"


def test_time_that_is_too_little_for_the_smallest_comparison_is_refused_and_changes_nothing(many: Path) -> None:
    before = many.read_text()
    with pytest.raises(ConfigError, match=r"--minutes: the smallest comparison takes .* are left"):
        fit(many, 20)
    assert many.read_text() == before
    edit(many, ["shared.training={use_cpu: true}"])
    with pytest.raises(ConfigError, match="max_steps"):
        fit(many, 3600)


def test_a_fitted_study_ends_in_time_also_where_searches_take_longer(many: Path, written: WrittenRuns) -> None:
    for seconds, far in product((160, 320), (1.0, 0.03)):
        many.parent.rename(many.parent.with_name(f"{seconds}-{far}"))
        file = tiny_study(
            many.parent,
            entries={
                name: {"method": name, "learning_rate": far * rate} for name, rate in (("smoa", 0.01), ("lora", 0.002))
            },
            seeds=[0, 1, 2, 3, 4],
        )
        began = written.now
        fit(file, seconds)
        work(file, deadline=began + seconds)
        assert written.now - began < seconds + 20, "what runs at the deadline is finished"
        assert all(len(list(file.parent.glob(f"{name}/*-seed-1"))) == 1 for name in ("smoa", "lora"))


def test_the_first_step_which_is_slow_does_not_count(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, found = many.read_text(), []
    for first in (0.1, 50.0):
        many.write_text(text)
        monkeypatch.setattr("smoa_lab.study.fit.time_steps", lambda *_, first=first: {"seconds": [first, 0.1, 0.1]})
        fit(many, 300)
        found.append(load_study(many))
    assert found[0].seeds == found[1].seeds
    assert found[0].shared == found[1].shared


def test_what_an_interrupted_fit_left_is_thrown_away_and_steps_are_not_kept(many: Path, written: WrittenRuns) -> None:
    fit(many, 3600)
    assert len(written.timed) == 2
    assert not (many.parent / "timing").exists()
    bases = [path for path in written.ran if "untouched" in path]
    fit(many, 3600)
    assert len([path for path in written.ran if "untouched" in path]) == 2 * len(bases) == 4
    finished(many)
