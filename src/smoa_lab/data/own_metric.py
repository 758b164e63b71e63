"""The metric of ``--metric FILE:NAME``: a function ``(answer, row) -> float`` of the user's, higher is better."""

from __future__ import annotations

import json
import math
import sys
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.names import nearest
from smoa_lab.basics.plain import portable
from smoa_lab.basics.trust import TRUSTED
from smoa_lab.data.answers import OWN
from smoa_lab.data.formats import shown

_loaded: dict[tuple[str, str | None], OwnMetric] = {}


class OwnMetric:
    """The function, loaded from the file that the command names. ``name`` has both, and the SHA-256 of the file."""

    def __init__(self, given: str) -> None:
        self.place, self.known = f"--metric {given}", dict[tuple[str, str], float]()
        file, _, name = given.rpartition(":")
        if not file:
            raise ConfigError(f"{self.place}: names no function of a file; write it as FILE.py:NAME")
        module: Any = ModuleType("smoa_own_metric")
        module.__file__, sys.modules[module.__name__] = file, module  # where dataclasses look
        try:
            source = Path(file).expanduser().read_bytes()
            digest = sha256(source).hexdigest()
            if TRUSTED.digest not in (None, digest):
                raise ValueError("it isn't the file that the command read; give the command again")
            with redirect_stdout(sys.stderr):  # stdout is for what the command prints
                exec(compile(source, file, "exec"), vars(module))
        except (Exception, SystemExit) as error:
            rule = "give a function in a file as FILE.py:NAME; it may import what is installed, and no file beside it"
            raise ConfigError(f"{self.place}: cannot be loaded: {type(error).__name__}: {error}; {rule}") from error
        self.function: Any = getattr(module, name, None)
        if not callable(self.function):
            functions = [key for key, value in vars(module).items() if callable(value)]
            raise ConfigError(f"{self.place}: {file} has no function {name!r}{nearest(name, functions)}")
        TRUSTED.digest, self.name = digest, f"{portable(given)} {digest}"

    def score(self, answer: str, row: str, where: str) -> float:
        """What the function makes of an answer to ``row``, JSON of the place ``where``; it is asked once."""
        if (answer, row) not in self.known:
            try:
                with redirect_stdout(sys.stderr):
                    value = self.function(answer, json.loads(row))
                if not math.isfinite(value) or abs(float(value)) > 1e100:  # whose square is no number
                    raise ValueError(f"it returned {value}")
            except (Exception, SystemExit) as error:
                problem = f"{self.place}: fails on the answer {shown(answer)}: {type(error).__name__}: {error}"
                raise DataError(f"{where}: {problem}; return a finite number, or fix the row") from error
            self.known[answer, row] = float(value)
        return self.known[answer, row]


def own_metric(known: str | None = None) -> OwnMetric:
    """The function that the command names; raises ConfigError if it names none, such as the one that is ``known``."""
    if TRUSTED.metric is None:
        needed = (known or "FILE.py:NAME ").rpartition(" ")[0]
        raise ConfigError(f"data.metric: {OWN} is a function that only the command names: give --metric {needed}")
    if TRUSTED.digest is None or (TRUSTED.metric, TRUSTED.digest) not in _loaded:
        _loaded[TRUSTED.metric, TRUSTED.digest] = OwnMetric(TRUSTED.metric)  # which comes first, and sets the digest
    return _loaded[TRUSTED.metric, TRUSTED.digest]
