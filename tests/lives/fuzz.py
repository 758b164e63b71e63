"""Mutated adapter folders: each ends in an exception, whoever raises it, or is loaded as what it is.
`python -m tests.lives.fuzz --help`.

A finding is a load that hangs, or that gives another ΔW than the formulas say of the file's own tensors.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from torch import Tensor, nn

from smoa import SmoaConfig
from smoa.layer import SmoaLayer
from tests import oracle
from tests.lives.adapter_mutations import CONFIG, MUTATIONS, WEIGHTS

SECONDS, PATIENCE, BYTES = 10, 300, 1 << 30
"""What one load may take before it counts as a hang, computing or waiting, and as a huge allocation."""


class Base(nn.Module):
    """Two layers to adapt, of different shapes, and a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


@torch.no_grad()
def base(width: int = 12, size: float = 1.0) -> Base:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Base(width)
    for parameter in model.parameters():
        parameter.mul_(size)
    return model


TARGETS = ["up", "down"]
CORPUS: dict[str, tuple[PeftConfig, int]] = {
    "plain": (SmoaConfig(r=4, num_blocks=2, alpha=6.0, target_modules=TARGETS), 12),
    "ragged": (SmoaConfig(r=2, num_blocks=3, alpha=8.0, target_modules=TARGETS), 12),
    "head": (SmoaConfig(r=4, bias="all", modules_to_save=["head"], target_modules=TARGETS), 12),
    "patterns": (SmoaConfig(r=32, rank_pattern={"up": 3, "down": 2}, target_modules="up|down", modulation="none"), 12),
    "pattern": (SmoaConfig(r=6, num_blocks=3, num_blocks_pattern={"up": 2}, target_modules=TARGETS), 12),
    "other shapes": (SmoaConfig(r=4, num_blocks=2, target_modules=TARGETS), 14),
    "another base": (SmoaConfig(r=4, num_blocks=2, target_modules=TARGETS), 12),
    "lora": (LoraConfig(r=4, target_modules=TARGETS), 12),
}
if hasattr(peft, "HiraConfig"):  # from PEFT 0.20 on
    CORPUS["hira"] = (peft.HiraConfig(r=4, target_modules=TARGETS), 12)
NAMES = ("default", "up", "head", "0", "weight", "smoa_A")
"""Those under which adapters are loaded; some are parts of the names of tensors."""


def write_corpus(room: Path) -> dict[str, Path]:
    """One saved adapter of each kind, the same ones every time."""
    torch.manual_seed(2)
    for name, (config, width) in CORPUS.items():
        model = get_peft_model(base(width, 1.2 if name == "another base" else 1.0), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        model.save_pretrained(room / name)
    return {name: room / name for name in CORPUS}


@contextmanager
def limited() -> Iterator[None]:
    """An alarm after some seconds, and a limit to the memory that this process may add."""

    def alarm(*call: Any) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s of computing or {PATIENCE} s of waiting")

    limits = resource.getrlimit(resource.RLIMIT_DATA)  # files that are only mapped don't count
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + BYTES, limits[1]))
    signals = (signal.SIGPROF, signal.SIGALRM)
    before = [signal.signal(number, alarm) for number in signals]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def outcome(folder: Path, pristine: Path, name: str = "default") -> str:
    """What became of loading the folder under a name; one that starts with FINDING must not be."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base(), folder, adapter_name=name)
            layers = {place: m for place, m in model.base_model.model.named_modules() if isinstance(m, SmoaLayer)}
            found = {place: layer.get_delta_weight(name) for place, layer in layers.items()}
    except TimeoutError as error:
        return f"FINDING {error}"
    except Exception as error:  # PEFT's, safetensors' or smoa's
        return f"refused: {type(error).__name__}"
    if not layers:
        return "loaded by PEFT as another method"  # which is not ours to judge
    if pristine.name == "another base" and folder_bytes(folder) == folder_bytes(pristine):
        return "FINDING another base was not noticed"
    tensors = load_peft_weights(str(folder))
    for place, layer in layers.items():
        expected = _expected(layer, name, f"base_model.model.{place}.smoa_", tensors)
        fits = is_tame(tensors) | found[place].isfinite()  # NaN in a factor is NaN in its whole row, as LoRA has it
        if not torch.isclose(found[place].double(), expected, rtol=1e-3, atol=1e-5)[fits].all():
            return f"FINDING ΔW of {place} is not what the file says"
    return "loaded"


def is_tame(tensors: dict[str, Tensor]) -> bool:
    """Whether no product of them can leave float32."""
    return all(tensor.double().abs().max() < 1e12 for tensor in tensors.values() if tensor.numel())


def _expected(layer: SmoaLayer, adapter: str, prefix: str, tensors: dict[str, Tensor]) -> Tensor:
    """The oracle's ΔW of the file's tensors, and of the layer's own in the place of those that it lacks."""
    own = dict(zip(("A.weight", "B.weight"), layer.factors(adapter), strict=True))
    partition = dict(zip(("row_labels", "col_labels", "block_scale"), layer.partition_of(adapter), strict=True))
    brings_all = all(prefix + part in tensors for part in partition)  # else the layer decides all of it
    given = {name: tensor for name, tensor in tensors.items() if brings_all or name.endswith(".weight")}
    own |= partition
    A, B, rows, cols, scale = (given.get(prefix + part, tensor).detach().float() for part, tensor in own.items())
    known, scaling = layer.adapters[adapter], layer.scaling[adapter]
    return oracle.delta_weight(
        layer.base_weight().detach().double(),
        A.double(),
        B.double(),
        rows.long().tolist(),
        cols.long().tolist(),
        known.ranks,
        [scaling * float(c) for c in scale],
        known.modulation,
    )


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def fuzz(count: int, seed: int, room: Path, seconds: float = float("inf"), first: int = 0) -> Counter[tuple[str, str]]:
    """Outcomes by (mutation, outcome) of `count` folders from number `first` on, or of as many as the seconds allow."""
    corpus, results = write_corpus(room / "corpus"), Counter[tuple[str, str]]()
    started = time.monotonic()
    for number in range(first, first + count):
        if time.monotonic() - started > seconds:
            break
        random_number = random.Random(f"{seed} {number}")  # each folder by its own number, in whatever order
        name = random_number.choice(list(corpus))
        mutation = list(MUTATIONS)[number % len(MUTATIONS)]
        folder = room / "folder"
        shutil.copytree(corpus[name], folder)
        MUTATIONS[mutation](random_number, folder, corpus)
        result = outcome(folder, corpus[name], random_number.choice(NAMES))
        results[mutation, result] += 1
        if result.startswith("FINDING"):
            print(f"{seed} {number} {name} {mutation}: {result}", file=sys.stderr)  # noqa: T201
        shutil.rmtree(folder)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="a finding's number, with --count 1, repeats it alone")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--seconds", type=float, default=1200)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        results = fuzz(chosen.count, chosen.seed, Path(room), chosen.seconds, chosen.first)
    lines = Counter[str]()
    for (_, result), number in results.items():
        lines[result] += number
    print(f"seed {chosen.seed}: {lines.total()} folders from {chosen.first} on in {time.monotonic() - started:.0f} s")  # noqa: T201
    for result, number in lines.most_common():
        print(f"{number:6} {result}")  # noqa: T201
    sys.exit(any(result.startswith("FINDING") for result in lines))


if __name__ == "__main__":
    main()
