"""Whether searches with shorter runs choose rates as good as whole ones do:

    python studies/shorter.py FOLDER    # has sums-half, chats-half, …: of `smoa compare STUDY folder=… seeds=[]
                                        # shared.training.max_steps=N`; writes studies/shorter.json

The loss at the rate that a shorter search chose is read from the whole search's curve, against that of the whole one's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from calibration import Curve, starts_of
from stored import STUDIES

from smoa.atomic import write_whole
from smoa_lab.basics.plain import json_text

FILE = STUDIES / "shorter.json"
SHIFTS = tuple(number / 20 for number in range(-8, 5))
OF = {"chats": "chats-2", "sums": "chain-sum", "gsm8k": "gsm8k"}


def lost(folder: Path) -> dict[str, Any]:
    """Of each entry whose search is over: both rates, by how much the loss is higher at the shorter one's, and at that
    one moved by so many decades."""
    study = STUDIES / OF[folder.name.partition("-")[0]]
    whole, shorter = (json.loads((each / "chosen.json").read_text(encoding="utf-8")) for each in (study, folder))
    steps, found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["steps"], {}
    for name, one in shorter.items():
        known = sorted((float(tried), loss) for tried, loss in whole[name]["losses"].items())
        rates, losses = np.array(known).T
        curve = Curve(starts_of(study)[name], np.log10(rates), losses, 1.0)
        rate, before = one["learning_rate"], whole[name]["learning_rate"]
        apart = {f"{by:g}": curve.loss(rate * 10**by) - curve.loss(before) for by in SHIFTS}
        found[name] = {"steps": steps, "rate": rate, "whole": before, "lost": apart["0"], "losses": one["losses"]}
        found[name] |= {"shifted": apart}
    return found


def main(folder: Path) -> None:
    found = {each.name: lost(each) for each in sorted(folder.iterdir()) if (each / "chosen.json").is_file()}
    write_whole(FILE, json_text(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
