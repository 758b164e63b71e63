from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable
from itertools import product
from operator import itemgetter
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import pytest
import yaml
from filelock import FileLock

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import comparison
from smoa_lab.study.comparison import Comparison, load_study
from smoa_lab.study.runner import Runner
from smoa_lab.study.search import Tuned, first_index, nearest_index, next_indices, rate
from smoa_lab.study.study import Entry, Study, Tuning
from smoa_lab.study.trials import Job, Result, Trial, TrialStore, Untouched
from tests.support import lab
from tests.support.studies import entry, finish, tiny_study


def test_the_untouched_model_is_scored_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.fill_cache(study.folder.with_name("cache"), lab.questions(4, "train"), lab.questions(4, "test"))
    comparison = Comparison(study)
    calls: list[str] = []

    def score(config: RunConfig, part: str) -> dict[str, Any]:
        calls.append(part)
        return {"config": config.model_dump(mode="json"), "scores": {}}

    monkeypatch.setattr(comparison.runner, "untouched", score)
    assert comparison.perform(Untouched()) == comparison.perform(Untouched())
    assert calls == ["test"]
    comparison.runner.shared["training"] = {"use_cpu": True, "max_steps": 3}
    comparison.perform(Untouched())  # no training took place
    comparison.runner.shared["data"] = {"tasks": ["arc_easy"], "test_examples": 2}
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of data"):
        comparison.perform(Untouched())


def test_a_search_is_what_the_study_as_it_is_asks_for(study: Study) -> None:
    """Neither runs of another seed, nor the quarter decades of an earlier search, though they are the best."""
    assert Comparison(study).stored_search("ours") is None
    finish(study, Trial("tuning", "ours", 0.03, 7), 1.0)
    for value, loss in ((0.01, 2.0), (0.003, 2.2), (0.03, None), (0.006, 1.0), (0.02, 2.1)):
        finish(study, Trial("tuning", "ours", value, 100), loss)
    search = Comparison(study).stored_search("ours")
    assert search is not None
    assert (search.losses, search.learning_rate) == ({0.003: 2.2, 0.01: 2.0, 0.03: None}, 0.01)


@pytest.fixture
def ran(study: Study, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The thread and the name of each job that was run; nothing is trained."""
    ran: list[tuple[str, str]] = []

    def result(name: str, config: RunConfig) -> dict[str, Any]:
        ran.append((current_thread().name, name))
        time.sleep(0.02)
        loss = abs(math.log10(config.training.get("learning_rate", 1) / 0.1))
        scores = {"all": {"gold_loss": loss, "accuracy": 0.5}}
        return {"config": config.model_dump(mode="json"), "questions": {"nll": [loss]}, "scores": scores}

    def run(self: Runner, entry: Entry, rate: float, seed: int, part: str, work: Path) -> dict[str, Any]:
        return result(work.relative_to(study.folder / "work").as_posix(), self.config(entry, rate, seed))

    monkeypatch.setattr(Runner, "check_needs", lambda self, entry: None)
    monkeypatch.setattr(Runner, "untouched", lambda self, config, part: result("untouched", config))
    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(comparison, "POLL_SECONDS", 0.005)
    return ran


def test_two_drivers_share_a_study_and_run_no_job_twice(study: Study, ran: list[tuple[str, str]]) -> None:
    drivers = [Thread(target=Comparison(study).run, name=name) for name in "ab"]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(name for _, name in ran) == TrialStore(study.folder).names()
    assert {driver for driver, _ in ran} == {"a", "b"}
    assert sum(name.startswith("final/") for _, name in ran) == len(study.entries) * len(study.seeds)


def test_a_driver_that_loses_a_job_to_another_one_takes_the_next(
    study: Study, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when both looked at the same moment, after the same job."""
    mine = Comparison(study)
    mine.run(["ours"])
    ran.clear()
    taken = mine.ready(["lora"])[0]
    looked: list[str] = []
    is_running = TrialStore.is_running

    def a_moment_ago(store: TrialStore, name: str) -> bool:
        looked.append(name)
        return len(looked) > 1 and is_running(store, name)

    monkeypatch.setattr(TrialStore, "is_running", a_moment_ago)
    lock = mine.store.folder / "work" / "locks" / f"{taken.name.replace('/', '_')}.lock"
    with FileLock(lock):
        driver = Thread(target=mine.run, args=(["lora"],), daemon=True)
        driver.start()
        deadline = time.monotonic() + 30
        while not ran and time.monotonic() < deadline:
            time.sleep(0.01)
        assert looked[0] == taken.name
        assert taken.name not in [name for _, name in ran]
        assert ran
    driver.join(30)
    assert taken.name in [name for _, name in ran]


BEST = {"ours": 0.1, "lora": 0.01, "full": 0.0003}


def search(
    losses: dict[int, float | None],
    start: int = -8,
    max_runs: int = 6,
    refine: bool = False,
    pick: Callable[[list[int]], int] = itemgetter(0),
) -> dict[int, float | None]:
    """Every index that the walk visits, with the loss there; ``pick`` says which of those needed is next."""
    visited: dict[int, float | None] = {}
    while indices := next_indices(start, visited, max_runs, refine):
        index = pick(indices)
        visited[index] = losses.get(index, 9.0)
    return visited


def valley(best: float) -> dict[int, float | None]:
    return {index: abs(index - best) for index in range(-18, 6)}


def test_the_grid_is_quarter_decades_and_a_search_starts_on_half_ones() -> None:
    assert [rate(index) for index in range(-12, -6)] == [1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2]
    assert [nearest_index(rate(index)) for index in range(-12, 12)] == list(range(-12, 12))
    assert [first_index(rate) for rate in (1e-3, 3e-3, 0.012, 0.03)] == [-12, -10, -8, -6]


def test_the_search_walks_downhill_until_the_best_is_inside() -> None:
    assert list(search({-8: 1.0})) == [-8, -10, -6]
    for best in (-14, -2):
        tuned = Tuned.of(search(valley(best)))
        assert (tuned.learning_rate, tuned.interior) == (rate(best), True)


def test_the_search_ends_when_its_runs_are_spent_those_of_a_finer_one_too() -> None:
    downhill: dict[int, float | None] = {index: -float(index) for index in range(-18, 18)}
    visited = search(downhill, max_runs=4)
    assert len(visited) == 4
    assert not Tuned.of(visited).interior
    assert search(downhill, max_runs=4, refine=True) == visited
    assert [len(search(valley(-8), max_runs=most, refine=True)) for most in (3, 4, 5, 6)] == [3, 4, 5, 5]


def test_a_diverged_run_is_never_the_best() -> None:
    visited = search({-10: 2.0, -8: None, -6: None})
    assert Tuned.of(visited).learning_rate == rate(-10)
    assert -12 in visited


@pytest.mark.parametrize("best", [-9, -8, -7])
def test_a_finer_search_tries_both_sides_of_the_best_half_decade(best: int) -> None:
    visited = search(valley(best + 0.1), refine=True)
    halves = {index: loss for index, loss in visited.items() if index % 2 == 0}
    middle = nearest_index(Tuned.of(halves).learning_rate)
    assert sorted(set(visited) - set(halves)) == [middle - 1, middle + 1]
    assert Tuned.of(visited).learning_rate == rate(best)


def test_a_search_visits_the_same_rates_in_whatever_order_results_come() -> None:
    for best, max_runs in product(range(-16, 2), (3, 8)):
        losses = valley(best + 0.1)
        wanted = search(losses, -8, max_runs, refine=True)
        for seed in range(5):
            assert search(losses, -8, max_runs, True, random.Random(seed).choice) == wanted


def outcome(job: Job) -> Result:
    """A result that is the better the nearer a trial's rate is to the best of its entry."""
    loss = 1.0 if isinstance(job, Untouched) else abs(job.learning_rate / BEST[job.entry] - 1)
    return {"questions": {"nll": [loss]}, "scores": {"all": {"gold_loss": loss}}}


def carried_out(study: Study, workers: int, seed: int) -> list[Job]:
    """The jobs in the order in which that many workers, of random speed, finish them."""
    plan, names, chance = Comparison(study), list(study.entries), random.Random(seed)
    running: list[Job] = []
    done: list[Job] = []
    while jobs := plan.ready(names):
        running += [job for job in jobs if job not in running][: workers - len(running)]
        done.append(running.pop(chance.randrange(len(running))))
        plan.finish(done[-1], outcome(done[-1]))
    return done


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("workers", [2, 40])
def test_many_workers_run_the_very_trials_that_one_runs(study: Study, workers: int, refine: bool) -> None:
    study = study.model_copy(update={"tuning": Tuning(refine=refine)})
    wanted = carried_out(study, workers=1, seed=0)
    for seed in range(3):
        done = carried_out(study, workers, seed)
        assert len(done) == len(wanted)
        assert set(done) == set(wanted)


def test_what_is_left_is_never_overestimated(study: Study) -> None:
    plan, names, jobs = Comparison(study), list(study.entries), carried_out(study, workers=1, seed=0)
    for number, job in enumerate(jobs):
        assert plan.at_least_left(names) <= len(jobs) - number
        plan.finish(job, outcome(job))
    assert plan.at_least_left(names) == 0


def test_a_run_with_one_question_without_a_loss_has_diverged(study: Study) -> None:
    plan = Comparison(study)
    for trial, nll in zip(plan.search("ours"), ([1.0, None], [1.0, 2.0], [3.0, 2.0]), strict=True):
        plan.finish(trial, {"questions": {"nll": nll}, "scores": {"all": {"gold_loss": 1.5}}})
    assert plan.tuned("ours").losses == {0.003: 1.5, 0.01: None, 0.03: 1.5}


def load(values: dict[str, Any], folder: Path) -> Study:
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_study(file)


@pytest.fixture
def values(shared: dict[str, Any]) -> dict[str, Any]:
    """What a study's file has."""
    return {
        "shared": shared,
        "entries": {
            "ours": {"method": "smoa", "learning_rate": 0.01},
            "full": {"method": "full", "learning_rate": 0.001},
        },
    }


@pytest.mark.parametrize("place", ["shared", "entries.ours"])
def test_no_study_lets_a_repository_run_its_code(place: str, values: dict[str, Any], tmp_path: Path) -> None:
    load(values, tmp_path)
    file = tmp_path / "two.yaml"
    with pytest.raises(ConfigError, match=rf"{place}\.model\.trust_remote_code: a file can't allow"):
        load_study(file, [f"{place}.model.trust_remote_code=true"])


LORA = {"method": "lora", "learning_rate": 0.01}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"entries": {}}, "entries"),
    ({"entries": {"..": LORA}}, r"entries: '\.\.' can't name a folder; leave out slashes"),
    ({"entries": {"lora": {**LORA, "budget": "lora"}}}, "is both an entry and a budget"),
    (
        {"entries": {"ours": {"method": "smoa", "learning_rate": 0.01, "adapter": {"num_block": 2}}}},
        r"entries\.ours(.|\n)*num_block(.|\n)*did you mean 'num_blocks'",
    ),
    ({"references": ["nobody"]}, "nobody is not an entry; entries: ours, full"),
    ({"tuning": {"max_runs": 1}}, r"tuning\.max_runs"),
    ({"shared": {"data": {"tasks": ["piqa"]}}}, r"shared\.model: is missing"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_study_is_one_clear_error(
    change: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(values | change, tmp_path)


def test_all_mistakes_of_keys_are_told_at_once_with_their_lines_and_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "folder: 3\nshared: {}\ntuning:\n  refin: true\nentries:\n  ours:\n    method: smoa\n    learnin_rate: 0.01\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file}: 4 problems"
    told = [
        r"line 1: folder: ",
        r"line 4: tuning\.refin: unknown key; did you mean 'refine'",
        r"line 6: entries\.ours\.learning_rate: is missing",
        r"line 8: entries\.ours\.learnin_rate: unknown key; did you mean 'learning_rate'",
    ]
    for line, wanted in zip(lines, told, strict=True):
        assert re.match(wanted, line.strip())


def test_a_study_has_one_dtype_on_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: True)
    study = tiny_study(tmp_path)
    assert Runner(study.shared).config(study.entries["ours"], 0.01, seed=0).model.dtype == "float32"


def test_the_untouched_model_of_a_quantized_study_is_described_without_training(study: Study) -> None:
    """Full fine-tuning of quantized weights is refused, and is not what is asked for."""
    in_4_bits = {"quantization_config": {"load_in_4bit": True}}
    shared = {**study.shared, "model": {"name": "base", "options": in_4_bits}}
    config = Runner(shared).untouched_config(study.entries["ours"])
    assert (config.method, config.adapter, config.model.options) == ("full", {}, in_4_bits)
    assert "learning_rate" not in config.training


# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_an_entry_that_trains_more_than_it_declares_is_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"smoa .* trains 448 parameters, not 400 to within 2%"):
        Runner(shared).run(entry(parameters=400), 0.01, 0, "test", tmp_path / "work")
    assert not list((tmp_path / "work").glob("checkpoint*"))  # before the first step


def test_a_study_without_held_out_questions_is_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    shared["data"]["validation_examples"] = 0
    with pytest.raises(ConfigError, match=r"shared\.data\.validation_examples: a study needs a validation part"):
        Runner(shared).run(entry(), 0.01, 0, "validation", tmp_path / "work")
