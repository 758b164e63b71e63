"""Rewrites the stored studies of `smoa compare` that earlier code made, from their originals at commit aa0fbca9:

    python studies/migrate.py

study.yaml loses the keys that are gone, and says how many steps and rounds were run. In each pack of runs only
``config`` changes: keys get the values that stood for them then. All other values are compared. plan.json, chosen.json
and results.json stay as records, which nothing of the lab reads.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from stored import PACK, STUDIES, compared

ORIGINALS = "aa0fbca9"
OLDER_FORMAT, OLDER_DATA = 3, {"group": False, "answer_tokens": 128}
"""What stood for keys of ``data`` in older formats: rows by themselves, and answers of at most so many tokens."""
ADDED = {"recall-1024": {"hira": 1}}
"""Entries that came after a look."""
NOTE = (
    "Made by earlier code: studies/migrate.py rewrote study.yaml and the configs of the stored runs. The originals are "
    f"at commit {ORIGINALS}."
)


def original(file: Path) -> bytes:
    place = f"{ORIGINALS}:{file.relative_to(STUDIES.parent).as_posix()}"
    return subprocess.run(["git", "-C", str(STUDIES), "show", place], capture_output=True, check=True).stdout


def study_file(text: str, plan: dict[str, Any], added: dict[str, int]) -> str:
    """The study's file in today's keys."""
    yaml, written = YAML(), io.StringIO()
    yaml.width, yaml.preserve_quotes = 10_000, True
    values: Any = yaml.load(text)
    for key in ("folder", "references", "gaps"):
        values.pop(key, None)
    for name, entry in values["entries"].items():
        entry.pop("parameters", None)
        if name in added:
            entry["added"] = added[name]
    values["shared"]["training"]["max_steps"] = plan["steps"]
    if plan["format"] < OLDER_FORMAT:
        for key, value in OLDER_DATA.items():
            values["shared"]["data"].setdefault(key, value)
    if values["seeds"] != plan["seeds"]:
        values["seeds"] = plan["seeds"]
    yaml.dump(values, written)
    return written.getvalue()


def migrate(folder: Path) -> None:
    """Write a study's file, its pack and the note in its README."""
    plan = json.loads(original(folder / "plan.json"))
    text = study_file(original(folder / "study.yaml").decode(), plan, ADDED.get(folder.name, {}))
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    readme = original(folder / "README.md").decode().rstrip("\n")
    (folder / "README.md").write_text(f"{readme}\n\n{NOTE}\n", encoding="utf-8")
    if not (folder / PACK).is_file():
        return
    runs = list(map(json.loads, gzip.decompress(original(folder / PACK)).decode().splitlines()))
    lines = "".join(f"{json.dumps({**run, 'config': migrated(run['config'])})}\n" for run in runs)
    (folder / PACK).write_bytes(gzip.compress(lines.encode(), mtime=0))
    stored = map(json.loads, gzip.decompress((folder / PACK).read_bytes()).decode().splitlines())
    for before, after in zip(runs, stored, strict=True):
        config, now = before.pop("config"), after.pop("config")
        assert before == after, "a value beside the config changed"
        assert config == {**now, "data": {key: now["data"][key] for key in config["data"]}}


def migrated(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the keys that it lacks."""
    return {**config, "data": {**OLDER_DATA, "recall": False, **config["data"]}}


if __name__ == "__main__":
    for each in compared():
        migrate(each)
