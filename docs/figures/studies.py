"""Rewrites the README.md, pictures and interactive page of every study in docs/studies, from its stored runs.

    python docs/figures/studies.py [name of a study]

And draws docs/inspections/*.png, from the JSON of `smoa inspect`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from smoa_lab.inspect_page import by_layer
from smoa_lab.pages.charts import save_picture
from smoa_lab.study.report.sequence.sequence_report import sequence_report
from smoa_lab.study.report.study_report import report
from smoa_lab.study.study_file import load_study

DOCS = Path(__file__).parents[1]
CONFIGS = DOCS.parent / "configs" / "studies"
CHANGED = {
    "headlines-refined": ("headlines", ["tuning.refine=true"]),
    "commonsense-float32": ("commonsense", ["shared.model.dtype=float32"]),
}
"""Studies that are another one's file with changes: that file and the changes."""
FIELDS = {"relative_update": "‖ΔW‖ / ‖W‖", "coverage": "coverage", "effective_rank": "effective rank of ΔW"}


def rewrite(name: str) -> None:
    config, changes = CHANGED.get(name, (name, []))
    study = load_study(CONFIGS / f"{config}.yaml", [*changes, f"folder=docs/studies/{name}"])
    (sequence_report if study.kind == "sequence" else report)(study)


def draw_inspection(file: Path) -> None:
    """One picture for each of FIELDS."""
    found = json.loads(file.read_text(encoding="utf-8"))
    methods = {Path(place).name: layers[0]["method"] for place, layers in found.items()}
    rows = [{**layer, "adapter": Path(place).name} for place, layers in found.items() for layer in layers]
    for field, title in FIELDS.items():
        picture = file.with_name(f"{file.stem}-{field.replace('_', '-')}.png")
        save_picture(by_layer(rows, methods, field, title), picture)


def main(*names: str) -> None:
    for name in names or sorted(path.parent.name for path in DOCS.glob("studies/*/runs.jsonl.gz")):
        print(name)
        rewrite(name)
    for file in sorted(DOCS.glob("inspections/*.json")):
        draw_inspection(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
