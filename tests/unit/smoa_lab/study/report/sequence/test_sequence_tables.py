from __future__ import annotations

from dataclasses import asdict
from typing import Any

from smoa_lab.study.report.results.statistics import Difference
from smoa_lab.study.report.sequence.equal_learning import Reading
from smoa_lab.study.report.sequence.sequence_tables import (
    EQUAL_HEADER,
    NEXT_HEADER,
    RUNS_HEADER,
    before_sentence,
    equal_lines,
    explained_lines,
    run_line,
    table_sections,
)

EQUAL = {
    "entry": "ours",
    "reference": "lora",
    "level": 1.5,
    "own": asdict(Reading(0.0123, 3.0, is_lowest=True)),
    "other": asdict(Reading(0.001, 3.2, is_lowest=False)),
    "difference": asdict(Difference(-0.2, -0.3, -0.1, "better", p=0.01, holm_p=0.07, holm_verdict="same")),
}


def test_an_entry_is_told_beside_its_reference_with_both_verdicts() -> None:
    (found,) = equal_lines({"equal": [EQUAL], "least_gaps": {}})
    read = ["1.500", "≤ 0.012", "3.000", "0.001", "3.200"]
    assert found == ["ours", *read, "-0.200 [-0.300, -0.100]", "better", "0.01", "0.07", "same", "–"]
    assert len(found) == len(EQUAL_HEADER)


def test_the_reference_is_named() -> None:
    line = equal_lines({"equal": [EQUAL | {"entry": "lora", "difference": None}], "least_gaps": {"lora": 0.25}})[0]
    assert (line[7], line[-1]) == ("reference", "0.250")


def test_a_rate_too_high_is_told_where_one_was_run() -> None:
    nothing = {"forgot": None, "forgot_elsewhere": None}
    names = ("relative_norm", "relative_spectral_norm", "stable_rank", "intruders")
    empty: dict[str, Any] = {"equal": [], "lower_levels": [], "next_rate": []}
    summary = {
        **empty,
        "least_gaps": {},
        "kept_elsewhere": empty,
        "correlations": dict.fromkeys(names, nothing),
    }
    assert [section.title for section in table_sections(summary)] == ["Explanations"]
    next_rate = {"best": 1e-3, "rate": 0.003, "learned_loss": 1.7, "kept_loss": 4.5, "cost": 0.75}
    summary["next_rate"] = [{"entry": "ours", "reference": "lora", **next_rate, "difference": EQUAL["difference"]}]
    found = table_sections(summary)[0]
    first, after = ["ours", "0.001", "0.003", "1.700", "4.500", "+0.750"], ["better", "0.01", "0.07", "same"]
    assert found.lines == [[*first, "-0.200 [-0.300, -0.100]", *after]]
    assert found.header == NEXT_HEADER
    assert len(found.lines[0]) == len(NEXT_HEADER)
    summary["next_rate"][0] |= {"kept_loss": None, "difference": None}
    assert table_sections(summary)[0].lines == [["ours", "0.001", "0.003", "diverged", *[""] * 7]]


def test_a_run_that_diverged_has_dashes() -> None:
    nothing = {"mean": None, "stderr": None}
    losses = dict.fromkeys(("second_loss", "first_loss", "seconds", "relative_norm", "relative_spectral_norm"))
    rest = {"stable_rank": 3.0, "intruders": 0, "forgot": nothing, "forgot_elsewhere": {"mean": 0.1, "stderr": 0.02}}
    run = {"entry": "ours", "learning_rate": 0.1, "seed": 0, "second_accuracy": 0.5, "first_accuracy": 0.25}
    line = run_line(run | losses | rest)
    assert line == ["ours/lr-0.1-seed-0", "–", "50.0", "–", "25.0", "–", "+0.100 ± 0.020", "–", "–", "3", "0", "–"]
    assert len(line) == len(RUNS_HEADER)


def test_an_explanation_that_never_varies_explains_nothing() -> None:
    names = ("relative_norm", "relative_spectral_norm", "stable_rank", "intruders")
    found = explained_lines({"correlations": {name: {"forgot": None, "forgot_elsewhere": -0.5} for name in names}})
    assert found[-1] == ["intruder dimensions", "–", "-0.50"]


def test_without_the_untouched_model_nothing_is_told_of_it() -> None:
    assert before_sentence(None) == ""
