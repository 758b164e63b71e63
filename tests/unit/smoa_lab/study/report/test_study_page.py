from __future__ import annotations

import re

import pytest

from smoa_lab.study.packing import pack
from smoa_lab.study.report.study_report import report
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import TrialStore
from tests.support.studies import finish_a_study, page


@pytest.mark.parametrize("packed", [False, True])
def test_every_link_of_a_report_leads_to_its_run(study: Study, packed: bool) -> None:
    finish_a_study(study)
    if packed:
        pack(study.folder)
    report(study)
    html = (study.folder / "index.html").read_text()
    lines = dict(re.findall(r'<tr><td><span id="([^"]+)">[^<]+</span></td>(.*?)</tr>', html))
    assert sorted(lines) == TrialStore(study.folder).names()
    links = set(re.findall(r'"(?:run":")?#((?:final|tuning)/[^"]+)"', html))
    assert links == {name for name in lines if name not in ("untouched", "tuning/ours/lr-0.03-seed-100")}
    values = re.findall(r"<td>([^<]*)</td>", lines["final/ours/lr-0.01-seed-0"])
    assert values == ["2.0000", "50.0", "60", "7", "a CPU", "ccccccc"]
    assert lines["tuning/ours/lr-0.03-seed-100"].startswith("<td>diverged</td>")
    command = """gzip -dc runs.jsonl.gz | grep -F '"name":"final/ours/'"""
    assert f"`{command}`" in page(study)
    assert command in html.replace("&quot;", '"').replace("&#x27;", "'")
