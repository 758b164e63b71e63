from __future__ import annotations

from smoa_lab.study.crews.crew import ThisProcess
from smoa_lab.study.plan import Untouched


def test_one_process_takes_one_job_at_a_time() -> None:
    crew = ThisProcess(lambda job: {"name": job.name})
    assert not crew.is_full
    crew.start(Untouched())
    assert crew.is_full
    assert crew.running == [Untouched()]
    assert crew.next_finished() == (Untouched(), {"name": "untouched"})
    assert not crew.is_full
