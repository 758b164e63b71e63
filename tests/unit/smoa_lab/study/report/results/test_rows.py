from __future__ import annotations

from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.study.report.results.rows import entry_row
from smoa_lab.study.report.study_report import report
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Stage, Trial
from tests.support.studies import finish, finish_a_study, finish_untouched, page


def test_seeds_that_only_one_has_are_not_compared(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    finish(study, Trial("final", "lora", 0.01, 1), 2.5)
    rows = {row.entry: row for row in report(study)}
    assert rows["lora"].loss_difference is rows["lora"].accuracy_difference is None


def test_seeds_that_the_study_does_not_name_are_left_out(study: Study) -> None:
    for seed in (0, 1, 7):
        finish(study, Trial("final", "ours", 0.01, seed), 2.0)
    found = entry_row(study, "ours", (None, None))
    assert found is not None
    assert found.seeds == [0, 1]


def test_accuracy_is_told_task_by_task(study: Study) -> None:
    for seed in (0, 1):
        scores = {name: {"accuracy": share + seed / 10} for name, share in (("piqa", 0.5), ("boolq", 0.3))}
        scores["all"] = {"gold_loss": 2.0, "accuracy": 0.4 + seed / 10, "majority": None}
        finish(study, Trial("final", "ours", 0.01, seed), 2.0, scores=scores)
    untouched = {"gold_loss": 4.0, "accuracy": 0.25, "majority": None}
    scores = {"piqa": {"accuracy": 0.4}, "boolq": {"accuracy": 0.2}, "all": untouched}
    finish_untouched(study, scores=scores)
    report(study)
    assert (
        "| entry | piqa | boolq | mean |\n|---|--:|--:|--:|\n| ours | 55.0 | 35.0 | 45.0 |\n| untouched | 40.0"
        in page(study)
    )


def test_what_was_known_before_is_told(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0, elsewhere=3.0)
    scores = {"all": {"gold_loss": 4.0, "accuracy": 0.25, "majority": 0.6}}
    finish_untouched(study, scores=scores, elsewhere=3.5)
    assert report(study)[0].elsewhere == 3.0
    told = "The untouched model: loss 4.0000, accuracy 25.0 %; the commonest label of each task is right in 60.0 %; "
    assert f"{told}its loss elsewhere is 3.500." in page(study)
    scores["all"]["majority"] = None
    finish_untouched(study, scores=scores)
    report(study)
    assert "The untouched model: loss 4.0000, accuracy 25.0 %.\n" in page(study)


def test_runs_on_different_questions_are_not_compared(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0, sha256="one")
    finish(study, Trial("final", "lora", 0.01, 0), 2.5, sha256="another")
    with pytest.raises(DataError, match="were scored on different questions"):
        report(study)


def test_the_seconds_of_resumed_runs_are_left_out(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0, seconds=None)
    assert report(study)[0].seconds is None
    finish(study, Trial("final", "ours", 0.01, 1), 2.0)
    assert report(study)[0].seconds == 7.0


def test_seconds_are_those_of_the_machine_that_made_most_runs(study: Study) -> None:
    fast, slow = ({"provenance": {"device": device, "threads": 1}} for device in ("fast", "slow"))
    for seed, machine, seconds in ((0, slow, 70.0), (1, slow, 80.0), (2, fast, 10.0)):
        finish(study, Trial("final", "ours", 0.01, seed), 3.0, seconds=seconds, **machine)
    finish(study, Trial("final", "lora", 0.01, 0), 3.0, seconds=5.0, **fast)
    finish(study, Trial("final", "full", 0.001, 0), 3.0, seconds=None, **slow)
    assert {row.entry: row.seconds for row in report(study)} == {"ours": 75.0, "lora": None, "full": None}


def changed(study: Study, **adapter: Any) -> Study:
    """The study with another adapter of one entry."""
    entry = study.entries["ours"].model_copy(update={"adapter": adapter})
    return study.model_copy(update={"entries": {**study.entries, "ours": entry}})


@pytest.mark.parametrize("stage", ["tuning", "final"])
def test_runs_of_other_settings_are_not_reported_as_the_entrys(stage: Stage, study: Study) -> None:
    finish(study, Trial("final", "lora", 0.01, 0), 2.0)
    finish(study, Trial(stage, "ours", 0.01, study.tuning.seed if stage == "tuning" else 0), 2.0)
    report(study)
    with pytest.raises(ConfigError, match=rf"{stage}/ours/.*: was run with other values of adapter"):
        report(changed(study, r=32))


def test_runs_of_other_settings_that_the_study_does_not_ask_for_stand_in_no_ones_way(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 7), 2.0)
    finish(study, Trial("final", "ours", 0.003, 0), 2.0)
    other = changed(study, r=32)
    finish(other, Trial("final", "ours", 0.01, 0), 3.0)
    assert [row.seeds for row in report(other)] == [[0]]


def test_an_untouched_model_that_was_scored_on_other_data_is_not_reported(study: Study) -> None:
    finish_a_study(study)
    report(study)
    other = study.model_copy(update={"shared": {**study.shared, "data": {"tasks": ["piqa"]}}})
    (study.folder / "final").rename(study.folder / "kept")
    (study.folder / "tuning").rename(study.folder / "kept-too")
    finish(other, Trial("final", "ours", 0.01, 0), 2.0)
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of data"):
        report(other)
