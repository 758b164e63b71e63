"""Twenty faults, planted one at a time into a copy of src/smoa, and whether something finds them. Written before
tests/states.py, so that the machine could not be fitted to them.

    python -m tests.mutants                                    # list them, and check that each still fits the source
    python -m tests.mutants --only unmerge-restores-one -- python -m tests.states --minutes 15

A command finds a fault if it fails within the limit. With `--table FILE` outcomes are kept, and a run that was stopped
goes on.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src"


class Mutant(NamedTuple):
    """One edit of a file of src/smoa: `old`, which stands there once, becomes `new`."""

    name: str
    place: str
    file: str
    old: str
    new: str

    def plant(self, source: Path) -> None:
        path = source / "smoa" / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.name}: stands {text.count(self.old)} times in {self.file}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


MUTANTS = [
    Mutant(
        "merge-forgets-merged", "merging", "layers/merging.py",
        "chosen = [*self.merged_adapters, *names]", "chosen = [*names]",
    ),
    Mutant(
        "unmerge-restores-one", "merging", "layers/merging.py",
        "for kept in own.blocks.values():", "for kept in [*own.blocks.values()][:1]:",
    ),
    Mutant(
        "shared-weight-in-place", "merging", "layers/merging.py",
        "if self.shares_weight and own.replaced is None:", "if False:",
    ),
    Mutant(
        "safe-merge-half-way", "merging", "tuner/model.py",
        "        if safe_merge:\n            check_all_finite", "        if False:\n            check_all_finite",
    ),
    Mutant(
        "anchor-is-merged", "merging", "layers/layer.py",
        "return self.unmerged(self.base_weight(number), number)", "return self.base_weight(number)",
    ),
    Mutant(
        "disabled-stays-merged", "merging", "layers/layer.py",
        "            if self.merged:\n                self.unmerge()\n", "",
    ),
    Mutant(
        "merged-leaves-several", "merging", "tuner/merged.py",
        "                if layer.merged:\n                    layer.unmerge",
        "                if len(layer.merged_adapters) == 1:\n                    layer.unmerge",
    ),
    Mutant(
        "table-never-loaded", "loading", "files/names.py",
        "    return torch.equal(own.to(narrow), saved.to(own.device, narrow))", "    return True",
    ),
    Mutant(
        "refused-load-stays", "loading", "files/loading.py",
        "            table.update(known)", "            pass",
    ),
    Mutant(
        "stale-blocks", "loading", "layers/adapter.py",
        "if is_same and self.versions == _versions(saved):", "if is_same:",
    ),
    Mutant(
        "hotswap-keeps-absent", "loading", "hotswap.py",
        "state[A], state[B] = map(torch.zeros_like, layer.factors(adapter_name))",
        "state[A], state[B] = map(torch.clone, layer.factors(adapter_name))",
    ),
    Mutant(
        "hotswap-forgets-alpha", "loading", "hotswap.py",
        "ratio = config.alpha_of(name, sum(ranks), shape) / sum(ranks) / layer.adapters[adapter].scaling",
        "ratio = 1.0",
    ),
    Mutant(
        "broken-file-loads", "loading", "files/checks.py",
        "    if not math.isfinite(largest):", "    if False:",
    ),
    Mutant(
        "biases-not-saved", "saving", "files/names.py",
        'if config.bias == "none":', 'if config.bias != "all":',
    ),
    Mutant(
        "merged-table-saved", "saving", "files/saving.py",
        "if isinstance(layer, SmoaLayer):  # PEFT saves its table too", "if False:",
    ),
    Mutant(
        "active-is-saved", "saving", "files/saving.py",
        "if (key := key_of(name, part, adapter_name)) in state_dict:",
        "if (key := key_of(name, part, layers[name].active_adapters[0])) in state_dict:",
    ),
    Mutant(
        "name-is-a-part", "names", "files/names.py",
        "if adapter_name in layer.smoa_A}", "if any(name.startswith(adapter_name) for name in layer.smoa_A)}",
    ),
    Mutant(
        "names-outlive-call", "calls", "layers/by_name.py",
        "OPEN.pop(thread, None)  # a call within this one may have left none", "pass",
    ),
    Mutant(
        "base-rows-adapted", "calls", "layers/by_name.py",
        "slot_of.get(name, -1)", "slot_of.get(name, 0)",
    ),
    Mutant(
        "beams-not-repeated", "calls", "layers/by_name.py",
        "return 1 if module in self.once else self.copies", "return 1",
    ),
]  # fmt: skip


def run(mutant: Mutant, command: list[str], limit: float) -> str:
    """Run a command with the mutant in place of smoa: "found", "missed" or "timeout", and seconds of a processor."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "src")
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
        mutant.plant(source)
        before, environment = processor_seconds(), os.environ | {"PYTHONPATH": str(source)}
        try:
            code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
            found = "found" if code else "missed"
        except subprocess.TimeoutExpired:
            found = "timeout"
        return f"{found} after {processor_seconds() - before:.0f} s"


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this mutant; may be given several times")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each")
    parser.add_argument("--table", type=Path, help="a JSON file of outcomes; what it has is not run again")
    parser.add_argument("--column", default="command", help="what the command is called there")
    parser.add_argument("command", nargs="*", help="after --: what may find them; without one, they are listed")
    given = parser.parse_args(arguments)
    table = json.loads(given.table.read_text()) if given.table is not None and given.table.exists() else {}
    for mutant in MUTANTS:
        if given.only and mutant.name not in given.only:
            continue
        row = table.setdefault(mutant.name, {})
        if not given.command:
            print(f"{mutant.place:8} {mutant.name:24} {row or run(mutant, ['true'], 60).split()[0]}")  # noqa: T201
        elif given.column not in row:
            row[given.column] = run(mutant, given.command, given.limit)
            print(f"{mutant.name}: {row[given.column]}", flush=True)  # noqa: T201
            if given.table is not None:
                given.table.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
