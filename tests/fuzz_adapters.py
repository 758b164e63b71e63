"""Mutated adapter folders: each must load as what it is, or be refused. `python -m tests.fuzz_adapters --help`.

A finding is a load that hangs, grows beyond a limit, changes the base, gives another ΔW than the folder's files say, or
ends in an error of Python's that smoa let through.
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
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from smoa import SmoaConfig, SmoaError
from smoa.layer import SmoaLayer
from tests import reference
from tests.support.adapter_mutations import CONFIG, MUTATIONS, WEIGHTS

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


def base(width: int = 12, seed: int = 1) -> Base:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Base(width)


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "r is smaller than num_blocks")
            model = get_peft_model(base(width, 2 if name == "another base" else 1), config)
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
    expected = base()
    try:
        with limited(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base(), folder, adapter_name=name)
    except SmoaError as error:
        named = str(folder) in str(error) or "SmoaConfig" in str(error)
        return f"refused by smoa: {type(error).__name__}" if named else f"FINDING unnamed: {error}"
    except (MemoryError, TimeoutError) as error:
        return f"FINDING {type(error).__name__}: {error}"
    except Exception as error:
        return _foreign_error(error)
    verdict = _verdict(model, name, expected, folder, pristine)
    if pristine.name == "another base" and verdict.startswith("loaded: the same"):
        return "FINDING another base was not noticed"
    named = [each for each in warned if "should not be contained in the prefix" not in str(each.message)]
    return verdict + (", with a warning" if named else "")


def _foreign_error(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1].filename
    if "can't allocate" in str(error):
        return f"FINDING huge allocation: {error}"
    if "/src/smoa/" in frame:
        return f"FINDING {type(error).__name__} inside smoa: {error}"
    library = frame.partition("site-packages/")[2].split("/")[0] or Path(frame).parent.name
    return f"refused by {library}: {type(error).__name__}"


def _verdict(model: PeftModel, adapter: str, expected: Base, folder: Path, pristine: Path) -> str:
    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, SmoaLayer)}
    if not layers:
        return "loaded by PEFT as another method"  # which is not ours to judge
    for name in TARGETS:
        found: Any = model.base_model.model.get_submodule(name)
        plain = found.get_base_layer() if hasattr(found, "get_base_layer") else found
        if not torch.equal(plain.weight, expected.get_submodule(name).weight):
            return f"FINDING the base weight of {name} was overwritten"
    tensors = load_file(folder / WEIGHTS)
    for name, layer in layers.items():
        is_finite = torch.isfinite(layer.get_delta_weight(adapter)).all()
        if not is_finite or not _agrees(layer, adapter, name, tensors, expected):
            return f"FINDING ΔW of {name} is not finite or not what the file says"
    if folder_bytes(folder) == folder_bytes(pristine):
        return "loaded: the same bytes"
    return _compared(model.peft_config[adapter], pristine, tensors)


def _compared(config: Any, pristine: Path, tensors: dict[str, Tensor]) -> str:
    saved, untouched = SmoaConfig.from_pretrained(pristine), load_file(pristine / WEIGHTS)
    same = tensors.keys() == untouched.keys() and all(
        tensors[key].dtype == untouched[key].dtype and torch.equal(tensors[key], untouched[key]) for key in tensors
    )
    settings = ("alpha", "alpha_pattern", "num_blocks", "modulation")
    if same and all(getattr(config, key) == getattr(saved, key) for key in settings):
        return "loaded: the same adapter"
    return "loaded as the files say"


def _agrees(layer: SmoaLayer, adapter: str, name: str, tensors: dict[str, Tensor], expected: Base) -> bool:
    prefix = f"base_model.model.{name}.smoa_"
    A, B = (tensors[f"{prefix}{side}.weight"].float().double() for side in "AB")
    # that are whole numbers in any dtype are loaded
    rows, cols = (tensors[f"{prefix}{side}_labels"].double().round().long().tolist() for side in ("row", "col"))
    weight = expected.get_submodule(name).weight.detach().double()
    known, scaling = layer.adapters[adapter], layer.scaling[adapter]
    ranks = known.ranks
    delta = reference.delta_weight(weight, A, B, rows, cols, ranks, scaling, known.modulation)
    scales = tensors.get(f"{prefix}block_scale", torch.ones(len(ranks)))
    delta = delta * scales.float().double()[rows][:, None]
    return torch.allclose(layer.get_delta_weight(adapter).double(), delta, rtol=1e-3, atol=1e-5)


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
