"""Runs the machine from a new seed: `make states`, or `python -m tests.lives --minutes 15`."""

import argparse
import random
import sys
import time
import traceback
from itertools import combinations

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import run_state_machine_as_test

from tests.lives import machine


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--shrink", type=int, default=60, help="seconds for a shorter sequence")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    number = random.randrange(1 << 30) if given.seed is None else given.seed
    print(f"seed {number}", flush=True)  # noqa: T201
    engine.MAX_SHRINKING_SECONDS = given.shrink
    engine.ConjectureRunner.generate_mutations_from = lambda *args: None  # copies of what ran: rules would not meet
    started = time.process_time()
    machine.END[0] = started + given.minutes * 60
    chosen = settings(
        max_examples=1_000_000,  # Hypothesis begins with simple ones, a tenth of them
        stateful_step_count=given.steps,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(number)(machine.Machine), settings=chosen)
    except pytest.skip.Exception:
        return 0
    except Exception as error:
        if not machine.FIRST:  # Hypothesis was repeating an example when the time was over
            return 0
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}")  # noqa: T201
        print(f"found after {machine.FIRST[0] - started:.0f} s (shrunk {time.process_time() - started:.0f} s)")  # noqa: T201
        return 1
    finally:
        report(time.process_time() - started)


def report(seconds: float) -> None:
    counts, names = machine.COUNTS, [*machine.RULES]
    print(f"{machine.EXAMPLES[0]} examples, {sum(counts.values())} rules in {seconds:.0f} s")  # noqa: T201
    print("rule, how often, in how many examples with the rule that it met least")  # noqa: T201
    pairs = {pair: machine.PAIRS[pair] for pair in combinations(sorted(names), 2)}
    for name in names:
        rarest, count = min(((p, n) for p, n in pairs.items() if name in p), key=lambda pair: pair[1])
        print(f"{name:14} {counts[name]:6} {count:5} with {next(each for each in rarest if each != name)}")  # noqa: T201
    print(f"{len(pairs)} pairs, the rarest in {min(pairs.values())} examples")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
