"""Measures how long 16 runs of the encoder study take on one worker and on several, one thread each.

    python benchmarks/study_workers.py [--workers 2] [--steps 60] [--questions 2000]

Runs `smoa compare studies/headlines/headlines.yaml` twice, for two entries with eight seeds each at their first
learning rates, with everything that the command does: imports, Ray's start, reports. Compares all results but times and
machine. Writes benchmarks/results/study_workers.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import provenance, write_results

from smoa_lab.study.trials import TrialStore

STUDY = Path(__file__).parents[1] / "studies" / "headlines" / "headlines.yaml"
ENTRIES = ("smoa-k8", "lora")
SEEDS = list(range(8))
OF_A_RUN = ("seconds", "provenance")
"""What may differ between two runs of the same."""


def compare(folder: Path, workers: int, steps: int, questions: int) -> float:
    """Seconds of the whole command."""
    training = [f"shared.training.max_steps={steps}", f"shared.training.warmup_steps={steps // 10}"]
    data = f"shared.data.test_examples={questions}"
    values = [f"folder={folder}", "tuning.max_runs=0", f"seeds={SEEDS}", data, *training]
    only = [option for entry in ENTRIES for option in ("--only", entry)]
    command = [sys.executable, "-m", "smoa_lab", "compare", str(STUDY), *values, *only, "--workers", str(workers)]
    started = time.perf_counter()
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def results(folder: Path) -> dict[str, dict[str, Any]]:
    store = TrialStore(folder)
    runs = {name: store.find(name) or {} for name in store.names()}
    return {name: {key: run[key] for key in run if key not in OF_A_RUN} for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=2000, help="of the test part")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the runs have it, for the record
    with tempfile.TemporaryDirectory() as scratch:
        folders = {workers: Path(scratch, str(workers)) for workers in (1, arguments.workers)}
        seconds = {
            workers: compare(folder, workers, arguments.steps, arguments.questions)
            for workers, folder in folders.items()
        }
        one, several = (results(folder) for folder in folders.values())
    result = {
        "provenance": {**provenance(torch.device("cpu")), "clock": "wall"},
        "command": " ".join(["python benchmarks/study_workers.py", *sys.argv[1:]]),
        "runs": len(ENTRIES) * len(SEEDS),
        "steps": arguments.steps,
        "questions": arguments.questions,
        "seconds": {str(workers): round(one, 1) for workers, one in seconds.items()},
        "ratio": round(seconds[arguments.workers] / seconds[1], 3),
        "identical": one == several,
    }
    print({name: value for name, value in result.items() if name != "provenance"})
    print(write_results("study_workers", result))


if __name__ == "__main__":
    main()
