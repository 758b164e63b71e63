"""Whether searches with shorter runs choose rates as good as whole ones do:

    python studies/shorter.py FOLDER    # has sums-half, chats-half, …: studies that ran, with seeds: [] and fewer
                                        # max_steps; writes studies/shorter.json

The loss at the rate that a shorter search chose is read from the whole search's curve, against that of the whole one's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from again import unpacked
from calibration import Curve
from stored import STUDIES

from smoa_lab.basics.files import write_whole
from smoa_lab.basics.values import json_text
from smoa_lab.study.finished import chosen, read_finished
from smoa_lab.study.search import Chosen
from smoa_lab.study.study import STUDY, Study, load_study

FILE = STUDIES / "shorter.json"
SHIFTS = tuple(number / 20 for number in range(-8, 5))
OF = {"chats": "chats-2", "sums": "chain-sum", "gsm8k": "gsm8k"}


def rates(study: Study) -> dict[str, Chosen]:
    """Of each entry whose search is over."""
    finished = read_finished(study)
    return {name: one for name in study.entries if (one := chosen(study, finished, name)) is not None}


def lost(folder: Path) -> dict[str, Any]:
    """Of each entry both rates, by how much the loss is higher at the shorter one's, and at that one moved by so many
    decades."""
    study, found = load_study(folder / STUDY), dict[str, Any]()
    with unpacked(STUDIES / OF[folder.name.partition("-")[0]]) as long:
        whole, starts = rates(long), {name: entry.learning_rate for name, entry in long.entries.items()}
    for name, one in rates(study).items():
        tried, losses = np.array(sorted(whole[name].losses.items())).T
        curve = Curve(starts[name], np.log10(tried), losses, 1.0)
        rate, before = one.learning_rate, whole[name].learning_rate
        apart = {f"{by:g}": curve.loss(rate * 10**by) - curve.loss(before) for by in SHIFTS}
        found[name] = {"steps": study.shared["training"]["max_steps"], "rate": rate, "whole": before}
        found[name] |= {"lost": apart["0"], "losses": one.losses, "shifted": apart}
    return found


def main(folder: Path) -> None:
    found = {each.name: lost(each) for each in sorted(folder.iterdir()) if (each / STUDY).is_file()}
    write_whole(FILE, json_text(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
