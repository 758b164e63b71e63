"""Quality against size: several sizes of each method, searched one after the other, and compared at each and across."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.study.bounds import contrast
from smoa_lab.study.decision import by_size
from smoa_lab.study.default_study import default_study
from smoa_lab.study.plan import Timing, write_plan
from smoa_lab.study.study import ALL_SIZES, Entry, Study, Tuning
from smoa_lab.study.study_charts import sizes
from smoa_lab.study.study_report import report
from tests.support.studies import WrittenRuns, compared, fake_time, finished
from tests.unit.smoa_lab.study.test_default_study import room, smoa  # noqa: F401 - a fixture
from tests.unit.smoa_lab.study.test_run_study import carried_out, folders
from tests.unit.smoa_lab.study.test_verdict import budget

pytestmark = pytest.mark.usefixtures("quick_pictures")
RANKS = (1, 4, 16)
BEST = {1: 0.02, 4: 0.01, 16: 0.002}
"""Of each size, the best rate."""


def size_of(config: RunConfig) -> int:
    return int(config.adapter["r"])


@pytest.fixture
def sized(tmp_path: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch) -> Study:
    """LoRA and SMoA at three sizes: each is the better the larger it is, and the larger the lower its best rate."""

    def loss(config: RunConfig) -> float:
        size = size_of(config)
        away = abs(math.log10(config.training["learning_rate"] / BEST[size]))
        return 3.0 - 0.2 * math.log(size) + 0.1 * (config.method == "lora") + away

    timed = written.time_steps

    def time_steps(config: RunConfig, most: int, seconds: float) -> dict[str, Any]:
        return timed(config, most, seconds) | {"parameters": {"trainable": 1000 * size_of(config)}}

    monkeypatch.setattr("smoa_lab.study.executor.time_steps", time_steps)
    written.loss = loss
    block = {"target_modules": ["q_proj"]}
    entries = {
        f"{method}-r{size}": {
            "method": method,
            "adapter": {**block, "r": size, **({"num_blocks": 1} if method == "smoa" else {})},
            "learning_rate": 0.02,
            "budget": f"r = {size}",
            "size": size,
        }
        for size in RANKS
        for method in ("smoa", "lora")
    }
    shared = {"model": {"name": "base"}, "data": {"train": "x"}, "training": {"use_cpu": True, "max_steps": 100}}
    return Study.model_validate({"folder": tmp_path / "sized", "shared": shared, "entries": entries})


def plan_of(study: Study) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((study.folder / "plan.json").read_text())
    return found


def without(study: Study, *names: str) -> Study:
    return study.model_copy(update={"entries": {n: e for n, e in study.entries.items() if n not in names}})


@pytest.mark.usefixtures("no_looks")
def test_each_search_starts_at_the_rate_that_was_chosen_at_the_size_before(sized: Study, written: WrittenRuns) -> None:
    finished(sized)
    chosen = json.loads((sized.folder / "chosen.json").read_text())
    starts = plan_of(sized)["starts"]
    assert starts == {
        **dict.fromkeys(("smoa-r1", "lora-r1"), 0.02),
        **{f"{name}-r4": chosen[f"{name}-r1"]["learning_rate"] for name in ("smoa", "lora")},
        **{f"{name}-r16": chosen[f"{name}-r4"]["learning_rate"] for name in ("smoa", "lora")},
    }
    assert chosen["lora-r4"]["learning_rate"] == pytest.approx(BEST[4], rel=0.15)
    ran = [path for path in written.ran if "seed-100" in path]
    of_lora = [path.split("/")[-2] for path in ran if "/lora" in path]
    assert of_lora == sorted(of_lora, key=lambda name: int(name.partition("-r")[2])), "sizes one after the other"
    assert len(written.ran) == len(set(written.ran))


@pytest.mark.usefixtures("no_looks")
def test_a_start_that_another_process_wrote_stays(sized: Study, written: WrittenRuns) -> None:
    comparison = finished(sized)
    before = plan_of(sized)["starts"]
    comparison.plan = comparison.plan.model_copy(update={"starts": {}})
    comparison.chosen = {n: replace(one, learning_rate=0.5) for n, one in comparison.chosen.items()}
    comparison._fix_starts()
    assert plan_of(sized)["starts"] == before


@pytest.mark.usefixtures("no_looks")
def test_a_start_never_changes(sized: Study, written: WrittenRuns) -> None:
    short = sized.model_copy(update={"tuning": Tuning(max_runs=4)})
    BEST_FAR = 0.3
    usual = written.loss

    def loss(config: RunConfig) -> float | None:
        if size_of(config) == 1:
            return 3 + abs(math.log10(config.training["learning_rate"] / BEST_FAR))
        return usual(config)

    written.loss = loss
    finished(short)
    before = plan_of(short)
    assert json.loads((sized.folder / "chosen.json").read_text())["lora-r1"]["place"] == "edge"
    finished(short.model_copy(update={"tuning": Tuning(max_runs=8)}))
    after = plan_of(short)
    assert after["starts"] == before["starts"]
    chosen = json.loads((sized.folder / "chosen.json").read_text())
    assert chosen["lora-r1"]["place"] != "edge"
    assert chosen["lora-r1"]["learning_rate"] != after["starts"]["lora-r4"]
    dropped = without(short.model_copy(update={"tuning": Tuning(max_runs=8)}), "lora-r1")
    ran = len(written.ran)
    assert finished(dropped).plan.starts == {**after["starts"]}
    assert len(written.ran) == ran


@pytest.mark.usefixtures("no_looks")
def test_one_size_alone_searches_what_it_starts_from_and_trains_itself(sized: Study, written: WrittenRuns) -> None:
    compared(sized).run(["lora-r4"])
    assert {path.split("/")[0] for path in folders(sized, "*/lr-*-seed-100")} == {"lora-r1", "lora-r4"}
    assert {path.split("/")[0] for path in folders(sized, "*/lr-*-seed-[012]")} == {"lora-r4"}
    compared(sized).run(["r = 1"])
    assert {path.split("/")[0] for path in folders(sized, "*/lr-*-seed-[012]")} == {"lora-r4", "lora-r1", "smoa-r1"}
    ran = set(written.ran)
    finished(sized)
    assert len(written.ran) == len({*ran, *written.ran})


@pytest.mark.usefixtures("no_looks")
def test_where_the_size_before_failed_the_search_starts_at_the_one_before_or_at_its_own_rate(
    sized: Study, written: WrittenRuns
) -> None:
    usual, broken = written.loss, {"lora-r1", "smoa-r4"}

    def loss(config: RunConfig) -> float | None:
        if config.folder.parts[-2] in broken:
            raise RuntimeError("CUDA out of memory")
        return usual(config)

    written.loss = loss
    comparison = finished(sized)
    plan = comparison.plan
    assert plan.failed.keys() == broken
    assert plan.starts["lora-r4"] == 0.02
    assert plan.starts["smoa-r16"] == comparison.chosen["smoa-r1"].learning_rate
    broken.clear()
    again = finished(sized)
    assert again.plan.starts == plan.starts
    assert set(again.chosen) == set(sized.entries)


@pytest.mark.usefixtures("no_looks")
@pytest.mark.parametrize("workers", [1, 2, 40])
def test_many_workers_run_the_very_jobs_that_one_runs(sized: Study, written: WrittenRuns, workers: int) -> None:
    comparison = compared(sized)
    comparison._fix_starts()
    wanted = set(carried_out(sized, comparison.plan, written, 1, 0))
    write_plan(sized, comparison.plan)
    assert set(carried_out(sized, comparison.plan, written, workers, 7)) == wanted


def test_the_longest_chain_counts_sizes_one_after_the_other(sized: Study, written: WrittenRuns) -> None:
    plan = compared(sized).plan
    searches = {name: plan.seconds("search", name) for name in sized.entries}
    finals = [plan.seconds("final", name) for name in sized.entries]
    chain = max(sum(seconds for name, seconds in searches.items() if method in name) for method in ("lora", "smoa"))
    assert plan.longest(6, workers=100) == pytest.approx(4 * chain + max(finals))
    assert plan.longest(6, workers=1) == pytest.approx(6 * sum(searches.values()) + 3 * sum(finals))
    assert [row[2] for row in plan.table(sized).rows] == [
        *("2e-2", "2e-2", "smoa-r1", "lora-r1", "smoa-r4", "lora-r4"),
    ]


def test_a_study_with_sizes_ends_in_its_minutes_and_names_where_searches_were_cut(
    sized: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_time(monkeypatch, written)
    comparison = compared(sized, minutes=14)
    written.slower = 2.0
    comparison.run()
    assert written.now <= 14 * 60 + 60
    assert {one.place for one in comparison.chosen.values()} >= {"cut"}
    assert comparison.plan.starts.keys() == sized.entries.keys()
    ran = len(written.ran)
    compared(sized, minutes=14).run()
    assert len(written.ran) == ran


def test_each_size_and_all_sizes_get_their_verdict_and_then_the_study_ends(sized: Study, written: WrittenRuns) -> None:
    made = report(finished(sized))
    takes = plan_of(sized)["takes"]
    assert set(takes) == {"r = 1", "r = 4", "r = 16", ALL_SIZES}
    assert takes[ALL_SIZES]["entry"] == "smoa-r16"
    assert made.verdict[3].startswith("all sizes: smoa-r16 gained at least ")
    assert [sentence.split(":")[0] for sentence in made.verdict[:4]] == ["r = 1", "r = 4", "r = 16", "all sizes"]
    assert set(made.summary["budgets"]) == set(takes)
    assert len(made.summary["entries"]) == 6
    assert (sized.folder / "sizes.png").is_file()
    assert "![Quality against size](sizes.png)" in (sized.folder / "README.md").read_text()
    assert len(folders(sized, "*/lr-*-seed-[012]")) == 12, "two rounds told"


def test_entries_go_on_as_long_as_one_of_their_families_is_open(
    sized: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = written.loss

    def loss(config: RunConfig) -> float | None:  # seeds of the large ones differ
        wide = 0.4 * (int(config.training["seed"]) % 2) * (size_of(config) == 16)
        return (usual(config) or 0.0) + (wide if config.method == "lora" else -wide)

    written.loss = loss
    comparison = finished(sized)
    assert comparison.plan.takes["r = 1"].round == 2
    assert ALL_SIZES not in comparison.plan.takes
    assert len(folders(sized, "lora-r1/lr-*-seed-[012]")) == 3, "all sizes are not answered"


def test_a_size_that_was_dropped_still_counts_among_all_sizes(sized: Study, written: WrittenRuns) -> None:
    before = compared(sized)
    before.run()
    assert before.budgets()[ALL_SIZES].families["loss"].entries == 6
    kept = without(sized, "smoa-r16", "lora-r16")
    after = finished(kept)
    assert after.plan.dropped_sizes == {"smoa-r16": 16, "lora-r16": 16}
    of_sizes = after.budgets()
    assert of_sizes[ALL_SIZES].families["loss"].entries == 6
    assert of_sizes["r = 4"].families["loss"].entries == 2
    assert finished(sized).plan.dropped_sizes == {}


def test_the_smallest_that_keeps_enough_is_taken_across_sizes(sized: Study, written: WrittenRuns) -> None:
    def loss(config: RunConfig) -> float:
        away = abs(math.log10(config.training["learning_rate"] / BEST[size_of(config)]))
        return {1: 3.0, 4: 2.0, 16: 1.99}[size_of(config)] + 0.001 * (config.method == "lora") + 0.5 * away

    written.loss = loss
    made = report(finished(sized))
    assert made.verdict[3].startswith("all sizes: smoa-r4 keeps at least 9")
    assert "take smoa-r4, the smallest that does: " in made.verdict[3]


def test_entries_without_a_size_stand_beside_those_with_one(sized: Study, written: WrittenRuns) -> None:
    usual = written.loss
    written.loss = lambda config: 3.0 if config.method == "full" else usual(config)
    plain = {
        name: Entry(method=method, adapter=adapter, learning_rate=0.02, budget="plain")
        for name, method, adapter in (("base", "full", {}), ("own", "lora", {"r": 4, "target_modules": ["q_proj"]}))
    }
    mixed = sized.model_copy(update={"entries": {**plain, **sized.entries}})
    comparison = finished(mixed)
    budgets = comparison.budgets()
    made = report(comparison)
    assert made.verdict[0].startswith("plain: own gained")
    of_sizes = {name: budget for name, budget in budgets.items() if not budget.of_sizes}
    chart = sizes(budgets[ALL_SIZES], of_sizes, {name: name.split("-")[0] for name in mixed.entries})
    assert chart is not None
    plain_alone = {name: budget for name, budget in of_sizes.items() if name != "plain"}
    again = sizes(budgets[ALL_SIZES], plain_alone, {name: name.split("-")[0] for name in mixed.entries})
    assert len(chart.layer) == len(again.layer)


def test_entries_are_ordered_by_size_and_within_two_percent_by_cost() -> None:
    def timing(step: float, parameters: int) -> Timing:
        return Timing(parameters=parameters, step=step, beside=1)

    entries = {"a-r4": timing(1, 400), "b-r1": timing(3, 100), "a-r1": timing(2, 101), "c-r1": timing(2, 120)}
    assert by_size(entries) == ["a-r1", "b-r1", "c-r1", "a-r4"]


def test_seeds_are_pooled_within_a_size() -> None:
    random = np.random.default_rng(0)
    scale = np.array([1.0, 1.0, 5.0, 5.0])[:, None, None]
    values, untouched, weights = random.normal(size=(4, 3, 20)) * scale, np.zeros((1, 20)), np.ones(20)
    alone = contrast(values[:2], untouched, weights, 0, 1, 0.9)
    together = contrast(values, untouched, weights, 0, 1, 0.9, pools=(1, 1, 16, 16))
    assert (together.of_seeds, together.seeds_freedom) == (alone.of_seeds, alone.seeds_freedom)
    across = contrast(values, untouched, weights, 0, 2, 0.9, pools=(1, 1, 16, 16))
    variances = values.mean(axis=-1).var(axis=-1, ddof=1)
    parts = variances[:2].mean(), 0.9**2 * variances[2:].mean()
    own = variances[0] + 0.9**2 * variances[2]
    assert across.of_seeds == pytest.approx(max(sum(parts), own) / 3)
    assert across.seeds_freedom == pytest.approx(2 * sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2))


WRONG = [
    ({"lora": {"size": 4}}, "lora has size 4; call it lora-r4"),
    ({"lora-r4": {"size": 4, "budget": "all sizes"}}, "'all sizes' is that of all sizes together"),
]


@pytest.mark.parametrize(("entries", "told"), WRONG)
def test_wrong_entries_are_refused(entries: dict[str, Any], told: str, tmp_path: Path) -> None:
    values = {name: {"method": "lora", "learning_rate": 0.01, **own} for name, own in entries.items()}
    with pytest.raises(ValidationError, match=told):
        Study.model_validate({"folder": tmp_path, "shared": {"model": {"name": "base"}}, "entries": values})


# what the command writes


def test_the_command_writes_an_entry_for_each_method_and_size_and_gaps_with_their_reasons(room: Path) -> None:  # noqa: F811
    study = default_study("base", "chats.jsonl", ["lora", "dora", "ln_tuning"], sizes=(4, 1))
    assert list(study.entries) == ["lora-r1", "lora-r4", "dora-r4"]
    assert [(entry.budget, entry.size, entry.adapter["r"]) for entry in study.entries.values()][:2] == [
        ("r = 1", 1, 1),
        ("r = 4", 4, 4),
    ]
    assert list(study.gaps) == ["dora-r1", "ln_tuning-r1", "ln_tuning-r4"]
    assert "dora can't have the " in study.gaps["dora-r1"]
    assert len(study.seeds) == 5, "two methods at most are compared at a size"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sizes", "1,4", "--parameters", "lora:8"], "--sizes and --parameters both say how many each trains"),
        (["--sizes", "1,two"], "--sizes 1,two: write ranks of LoRA by commas, e.g. 1,4,16"),
        (["--sizes", "4,4"], "--sizes: 4 is no rank of LoRA, or named twice"),
        (["--sizes", "0"], "--sizes: 0 is no rank of LoRA, or named twice"),
        (["--sizes", "1", "--methods", "ln_tuning"], "--sizes: no method can have one of them: ln_tuning can't have"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_any_work(
    words: list[str],
    told: str,
    room: Path,  # noqa: F811
    written: WrittenRuns,
) -> None:
    assert told in smoa("compare", "--model", "base", "--data", "chats.jsonl", *words, code=1).stderr
    assert (
        "with which --methods, --parameters, --sizes and --set go"
        in smoa("compare", "x", "--sizes", "1", code=1).stderr
    )
    assert written.ran == []


def test_the_command_goes_on_with_more_sizes(room: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    timed = written.time_steps
    monkeypatch.setattr(
        "smoa_lab.study.executor.time_steps",
        lambda config, *rest: (
            timed(config, *rest)
            | {"parameters": {"trainable": 928 * config.adapter["r"] // config.adapter.get("num_blocks", 1)}}
        ),
    )
    words = ["compare", "--model", "base", "--data", "chats.jsonl", "--seeds", "2", "--sizes"]
    told = smoa(*words, "1").stdout
    assert "take lora-r1" in told
    assert "Budget: r = 1" in told
    more = smoa(*words, "1,4").stdout
    assert more.count("Budget: r = ") == 2
    assert "all sizes: " in more
    stored = yaml.safe_load((room / "studies" / "chats" / "study.yaml").read_text())
    assert list(stored["entries"]) == ["lora-r1", "smoa-r1", "lora-r4", "smoa-r4"]
    assert smoa("compare", "studies/chats", "--report-only").stdout == more
    assert "smoa-r1" in smoa(*words, "1,4", "folder=studies/other", "--plan").stdout


# the picture


def of_sizes(gained: dict[str, float], **values: Any) -> Any:
    """What a picture of entries shows, of which the last letter names the size."""
    ranks = sorted({name.partition("-r")[2] for name in gained}, key=int)
    own = {
        rank: budget({name: by for name, by in gained.items() if name.endswith(f"-r{rank}")}, **values)
        for rank in ranks
    }
    series = {name: name.partition("-r")[0] for name in gained}
    return sizes(budget(gained, **values), own, series)


def test_quality_is_drawn_against_size_and_a_line_joins_only_what_is_the_best_for_certain() -> None:
    clear = {"lora-r1": 0.5, "smoa-r1": 0.9, "lora-r4": 0.8, "smoa-r4": 1.2, "lora-r16": 1.5, "smoa-r16": 1.5}
    chart = of_sizes(clear)
    drawn = [rows for rows in chart.to_dict()["datasets"].values() if "entry" in rows[0]]
    assert sum(map(len, drawn)) >= 6
    joined = [rows for rows in chart.to_dict()["datasets"].values() if "place" in rows[0]]
    assert [[round(row["mean"], 3) for row in rows] for rows in joined] == [[4.1, 3.8]], "at r = 16 neither is the best"
    assert of_sizes(clear, rounds=1) is None
    titles = json.dumps(chart.to_dict())
    assert "trainable parameters" in titles
    assert "loss on held-out rows; lower is better" in titles
    assert '"type": "log"' in titles


def test_sizes_that_a_file_lists_in_another_order_are_joined_as_neighbors() -> None:
    gained = {"lora-r1": 0.5, "smoa-r1": 0.9, "lora-r4": 0.8, "smoa-r4": 1.2, "lora-r16": 1.1, "smoa-r16": 1.5}
    series = {name: name.partition("-r")[0] for name in gained}
    own = {f"r = {rank}": budget({n: by for n, by in gained.items() if n.endswith(f"-r{rank}")}) for rank in (16, 1, 4)}
    chart = sizes(budget(gained), own, series)
    joined = [rows for rows in chart.to_dict()["datasets"].values() if "place" in rows[0]]
    assert [[round(row["mean"], 3) for row in rows] for rows in joined] == [[4.1, 3.8], [3.8, 3.5]]


def test_points_have_bounds_of_their_difference_from_the_entry_to_take() -> None:
    chart = of_sizes({"lora-r1": 0.5, "smoa-r1": 1.5, "lora-r4": 1.5, "smoa-r4": 1.5})
    points = [row for rows in chart.to_dict()["datasets"].values() for row in rows if "entry" in row]
    by_entry = {row["entry"]: row for row in points}
    assert "low" not in by_entry["smoa-r1"], "all others are shown against it"
    worse = by_entry["lora-r1"]
    assert worse["low"] > by_entry["smoa-r1"]["mean"]
    assert worse["low"] < worse["mean"] < worse["high"]
    assert worse["clear"]
    assert not by_entry["lora-r4"]["clear"]


def test_points_without_bounds_differ_for_certain_from_nothing() -> None:
    whole = budget({"lora-r1": 0.5, "smoa-r1": 1.5}, groups=1)
    chart = sizes(whole, {"r = 1": whole}, {"lora-r1": "lora", "smoa-r1": "smoa"})
    points = [row for rows in chart.to_dict()["datasets"].values() for row in rows if "entry" in row]
    assert {row["entry"]: row["clear"] for row in points} == {
        "lora-r1": whole.against == "lora-r1",
        "smoa-r1": whole.against == "smoa-r1",
    }


def test_at_other_sizes_names_the_nearest_before(sized: Study) -> None:
    assert sized.at_other_sizes("lora-r1") == []
    assert sized.at_other_sizes("lora-r16") == ["lora-r4", "lora-r1"]
    with pytest.raises(ConfigError, match="--only: r = 2 is neither"):
        sized.chosen(["r = 2"])
    assert sized.chosen(["r = 4"]) == ["smoa-r4", "lora-r4"]
