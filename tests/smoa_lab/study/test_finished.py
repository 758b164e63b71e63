"""Whose runs the finished ones are, and what a search waits for."""

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.study.finished import chosen, done, finals, search
from smoa_lab.study.run_study import next_jobs, work
from tests.support.studies import BEST, StudyLife

pytestmark = pytest.mark.usefixtures("quick_pictures")


@pytest.mark.parametrize("best", [0.002, 0.006])
def test_a_search_waits_for_the_untouched_model_after_its_first_rates(
    best: float, life: StudyLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it goes, or whether it is over, is not decided by which worker is quicker."""
    monkeypatch.setitem(BEST, "lora", best)
    life.start("lora")
    study, known = life.study, dict(life.finished)
    del known["untouched-validation"]
    losses, jobs = search(study, known, "lora")
    assert (len(losses), [job.name for job in jobs]) == (3, ["untouched-validation"])
    assert chosen(study, known, "lora") is None
    assert finals(study, known, "lora") == {}
    assert chosen(study, life.finished, "lora") is not None


@pytest.mark.parametrize(
    ("change", "told"),
    [("shared.training.max_steps=7", "training.max_steps"), ("entries.lora.adapter={r: 4}", r"lora/.*adapter\.r")],
)
def test_a_run_of_another_config_is_refused_and_the_base_model_is_the_same(
    change: str, told: str, life: StudyLife
) -> None:
    life.start()
    life.edit(change)
    with pytest.raises(ConfigError, match=told):
        next_jobs(life.study, life.finished)
    assert done(life.study, life.finished, life.study.untouched("untouched")) is not None
    life.edit("shared.data.max_length=64")
    with pytest.raises(ConfigError, match=r"untouched: .*data\.max_length"):
        done(life.study, life.finished, life.study.untouched("untouched"))


def test_runs_on_other_rows_or_another_base_are_refused(life: StudyLife) -> None:
    life.start("lora")
    life.runs.digests["base"] = "other"
    with pytest.raises(DataError, match="another base"):
        work(life.file)


def test_a_damaged_file_of_a_run_is_named(life: StudyLife) -> None:
    life.start()
    [victim] = life.file.parent.glob("lora/lr-2e-3-seed-0/rows.jsonl.gz")
    victim.write_bytes(victim.read_bytes()[:40])
    life.look_again()
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: is damaged"):
        life.replay()
