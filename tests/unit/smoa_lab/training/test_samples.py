from __future__ import annotations

import re

import pytest

from smoa_lab.training.samples import samples_text

SAMPLE = {"question": "Open?", "reference": "Yes.", "before": "", "after": "  Yes!\n"}


def test_each_prompt_has_its_answers_below_it() -> None:
    text = samples_text([SAMPLE, {"question": "Today?", "after": "No."}])
    assert re.findall("^## Prompt .*", text, re.MULTILINE) == ["## Prompt 1", "## Prompt 2"]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["Reference", "Before", "After", "After"]
    assert re.findall(r"```text\n(.*)\n```", text) == ["Open?", "Yes.", "(nothing)", "Yes!", "Today?", "No."]


def test_the_level_of_the_headings_is_chosen() -> None:
    assert samples_text([SAMPLE], level=3).startswith("### Prompt 1\n")


def test_of_no_samples_there_is_no_text() -> None:
    assert samples_text([]) == ""


@pytest.mark.parametrize("ticks", ["```", "`````", "``````````"])
def test_code_in_an_answer_does_not_end_its_block(ticks: str) -> None:
    code = f"{ticks}python\nprint()\n{ticks}"
    text = samples_text([{"question": "Code?", "after": code}])
    fence = "`" * (len(ticks) + 1)
    assert f"\n{fence}text\n{code}\n{fence}\n" in text
