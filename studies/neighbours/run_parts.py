"""Runs the studies of this folder, one thread, one run after the other; what is finished is not run again.

    OMP_NUM_THREADS=1 python studies/neighbours/run_parts.py [PART ...]

Without a part: all of them, in their order. Rows come first, by rows_again.py. Each part is a study of `smoa compare`,
in work/PART: its searches, seeds and scores are the lab's own. Only the order differs: an entry is searched and run
with its three seeds before the next begins, so that what is told first is whole if time ends, and no look ends a part
early. The runs of a stored study with the same rows and settings are put into the folder first.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import peft_method  # noqa: E402, F401  (enters the methods into PEFT and the lab)
import torch  # noqa: E402
from again import OFFLINE, ONLINE  # noqa: E402
from smoa_lab.study.executor import Executor  # noqa: E402
from smoa_lab.study.plan import study_file  # noqa: E402
from smoa_lab.study.planning import prepare  # noqa: E402
from stored import STUDIES, runs_of  # noqa: E402

from smoa_lab.study.run_study import Comparison  # noqa: E402
from smoa_lab.study.study import Study, load_study  # noqa: E402
from smoa_lab.training.loaded_run import inputs  # noqa: E402
from smoa_lab.training.run_folder import RunFolder  # noqa: E402
from smoa_lab.training.train import run  # noqa: E402

logger = logging.getLogger("neighbours")
WORK = HERE / "work"
OFFLINE_IS_ONLINE = {OFFLINE: ONLINE}
"""Two digests of one base model, as again.py says."""


@dataclass(frozen=True)
class Part:
    """``order`` of the entries; the ``stored`` study that has the same rows, with the names there of the entries whose
    runs are used ``again``; the first layer that is adapted, below which the frozen ones compute each row once."""

    order: tuple[str, ...]
    stored: str
    again: dict[str, str] = field(default_factory=dict)
    first_adapted: int | None = None


FIRST = ("bhra", "abba")
OF_NAMES = (*FIRST, "smoa-spectral", "contiguous-without-w", "smoa-contiguous", "hira", "lora", "shira")
PARTS = {
    "chats": Part(
        (
            *FIRST,
            "smoa-contiguous",
            "contiguous-without-w",
            "shira",
            "abba-small-scale",
            "smoa-spectral",
            "lora",
            "hira",
        ),
        stored="chats-2",
        again={"smoa": "smoa-spectral", "lora": "lora", "hira": "hira"},
    ),
    "names-1024-one-layer": Part(OF_NAMES, stored="recall-1024", first_adapted=29),
    "names-512": Part(OF_NAMES, stored="recall-searched", first_adapted=28),
    "names-1024": Part(
        OF_NAMES,
        stored="recall-1024-r2",
        again={"smoa-spectral": "smoa-spectral", "lora": "lora"},
        first_adapted=28,
    ),
}
CHECKS = {
    "lora-here": ("lora", {"target_modules": "all-linear", "r": 8, "alpha": 16}),
    "hira-here": ("hira", {"target_modules": "all-linear", "r": 8}),
}
"""Methods that PEFT has too, with their entries in chats; each must come out as the stored runs of seed 0 did."""


def reuse(part: Part, target: Path, seeds: tuple[int, ...]) -> None:
    """Write the stored runs into a study's folder, where they count as finished. The base model is scored again: a plan
    reads more of that run than is stored."""
    names, stored = dict[str, str](), runs_of(STUDIES / part.stored)
    for name in stored:
        entry, _, rest = name.partition("/")
        if entry in part.again and int(rest.rpartition("-")[2]) in seeds:
            names[name] = f"{part.again[entry]}/{rest}"
    for name, place in names.items():
        folder, its = target / place, dict(stored[name])
        if (folder / "metrics.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        columns = its.pop("rows")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        with gzip.open(folder / "rows.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        text = json.dumps({**its, "samples": [], "history": []}).replace(OFFLINE, ONLINE)
        (folder / "metrics.json").write_text(text, encoding="utf-8")


def check_inputs(part: Part, study: Study) -> None:
    """Refuse rows, a base model or tokens that are not those of the stored study."""
    plan = json.loads((STUDIES / part.stored / "plan.json").read_text(encoding="utf-8"))
    found = inputs(study.config(next(iter(study.entries))))["digests"]
    stored = {key: OFFLINE_IS_ONLINE.get(digest, digest) for key, digest in plan["digests"].items()}
    if other := [key for key, digest in stored.items() if found[key] != digest]:
        raise SystemExit(f"{study.folder}: not the {', '.join(other)} of {part.stored}")


def planned(name: str) -> Comparison:
    """The study of a part in its folder, with what has run."""
    part, given = PARTS[name], HERE / f"{name}.yaml"
    study, executor = load_study(given), Executor()
    check_inputs(part, study)
    if part.again:
        reuse(part, study.folder, (study.tuning.seed, *study.seeds))
    with study_file(study, given):
        comparison = Comparison(study, prepare(study, executor.result))
    if comparison.plan.failed:
        raise SystemExit(f"{name}: entries can't be run: {comparison.plan.failed}")
    comparison.catch_up([*study.entries])
    return comparison


def check(comparison: Comparison) -> None:
    """LoRA and HiRA by neighbours.py, at the stored runs' rate and seed 0."""
    for method, (entry, adapter) in CHECKS.items():
        wanted = comparison.config(comparison.final(entry, 0))
        folder = Path("check", method)
        if RunFolder(folder).finished:
            continue
        training = {**wanted.training, "output_dir": str(folder)}
        metrics = run(wanted.model_copy(update={"method": method, "adapter": adapter, "training": training}))
        loss = metrics["evaluation"]["after"]["loss"]
        stored = [one.metrics["evaluation"]["after"]["loss"] for one in comparison.finals()[entry].values()]
        logger.info("check %s: loss %.4f, stored %s", method, loss, [round(each, 4) for each in stored])


def run_part(name: str) -> None:
    """Run what is missing of a part, entry by entry."""
    comparison, executor = planned(name), Executor()
    if name == "chats":
        check(comparison)
    for entry in PARTS[name].order:
        while jobs := comparison.ready([entry]):
            executor.start(jobs[0], comparison.config(jobs[0]))
            job, metrics = executor.next_finished()
            if isinstance(metrics, Exception):
                raise metrics
            if metrics is None:
                raise SystemExit(f"{job.name}: another process runs it")
            comparison.finish(job, metrics)
            after: dict[str, Any] = metrics["evaluation"].get("after") or metrics["evaluation"].get("before") or {}
            told = {key: after[key] for key in ("loss", "exact") if key in after}
            logger.info("%s %s: %s in %.0f s", name, job.name, told, metrics["wall_seconds"])


def keep_beginnings(first_adapted: int) -> None:
    """As the stored studies of names were run: to the same bits, and sooner."""
    spec = spec_from_file_location("of_recall", HERE.parent / "recall-searched" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    recall: Any = module_from_spec(spec)
    spec.loader.exec_module(recall)
    recall.FIRST_ADAPTED = first_adapted
    recall.keep_beginnings()


def main(names: list[str]) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    torch.set_num_threads(1)
    os.chdir(WORK)
    first_adapted = PARTS[names[0]].first_adapted
    if first_adapted is not None:
        keep_beginnings(first_adapted)
    try:
        run_part(names[0])
    except Exception:
        logger.exception("%s ended early", names[0])
    if names[1:]:  # a fresh process, of the same number: what one part keeps is nothing to the next
        os.execv(sys.executable, [sys.executable, str(HERE / "run_parts.py"), *names[1:]])


if __name__ == "__main__":
    main(sys.argv[1:] or [*PARTS])
