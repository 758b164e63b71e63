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

from smoa.errors import ConfigError, DataError, nearest
from smoa_lab.basics.plain import portable
from smoa_lab.basics.trust import Trust, trusted
from smoa_lab.data.answers import OWN
from smoa_lab.data.formats import shown


class OwnMetric:
    """The function, loaded from the file that the command names. ``name`` has both, and the SHA-256 of the file."""

    def __init__(self, given: Trust) -> None:
        self.given, self.place, self.known = given, f"--metric {given.metric}", dict[tuple[str, str], float]()
        file, _, name = str(given.metric).rpartition(":")
        module: Any = ModuleType("smoa_own_metric")
        module.__file__, sys.modules[module.__name__] = file, module  # where dataclasses look
        try:
            source = Path(file).expanduser().read_bytes()
            self.digest = sha256(source).hexdigest()
            if given.digest not in (None, self.digest):
                raise ValueError("it isn't the file that the command read; give the command again")
            exec(compile(source, file, "exec"), vars(module))
        except (Exception, SystemExit) as error:
            rule = "give a function in a file as FILE.py:NAME; it may import what is installed, and no file beside it"
            raise ConfigError(f"{self.place}: cannot be loaded: {type(error).__name__}: {error}; {rule}") from error
        self.function: Any = getattr(module, name, None)
        if not callable(self.function):
            functions = [key for key, value in vars(module).items() if callable(value)]
            raise ConfigError(f"{self.place}: {file} has no function {name!r}{nearest(name, functions)}")
        self.name = f"{portable(given.metric)} {self.digest}"

    def score(self, answer: str, row: str, where: str) -> float:
        """What the function makes of an answer to ``row``, JSON of the place ``where``; it is asked once."""
        if (answer, row) not in self.known:
            try:
                with redirect_stdout(sys.stderr):  # stdout is for what the command prints
                    value = self.function(answer, json.loads(row))
                if not math.isfinite(value):
                    raise ValueError(f"it returned {value}")
            except (Exception, SystemExit) as error:
                problem = f"{self.place}: fails on the answer {shown(answer)}: {type(error).__name__}: {error}"
                raise DataError(f"{where}: {problem}; return a finite number, or mend the row") from error
            self.known[answer, row] = float(value)
        return self.known[answer, row]


_loaded: list[OwnMetric] = []


def own_metric(known: str | None = None) -> OwnMetric:
    """The function that the command names; raises ConfigError if it names none, such as the one that is ``known``."""
    given = trusted()
    if given.metric is None:
        needed = (known or "FILE.py:NAME ").rpartition(" ")[0]
        raise ConfigError(f"data.metric: {OWN} is a function that only the command names: give --metric {needed}")
    if not _loaded or _loaded[0].given is not given:
        _loaded[:] = [OwnMetric(given)]
    return _loaded[0]
