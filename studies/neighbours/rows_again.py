"""Writes the rows of the stored studies anew, by their own scripts; run_parts.py compares their digests.

pip install chitchat-dataset
pip download --no-deps --dest wheels mimesis==22.2.0
python studies/neighbours/rows_again.py wheels/mimesis-22.2.0-py3-none-any.whl studies/neighbours/work
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

STUDIES = Path(__file__).parents[1]
NAMES = (512, 1024)


def main(wheel: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runpy.run_path(str(STUDIES / "chats" / "rows.py"))["main"](folder / "chats.jsonl")
    write_names = runpy.run_path(str(STUDIES / "recall-searched" / "phone_names.py"))["main"]
    for count in NAMES:
        write_names(wheel, str(folder / f"phonebook-{count}.jsonl"), str(count))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
