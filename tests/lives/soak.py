"""Thousands of lives of an adapter on one tiny layer: memory stays flat, the weights stay intact. `make soak`.

Each cycle injects, trains a step, saves, loads beside it, merges, unmerges, deletes and unloads.
"""

import argparse
import copy
import gc
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from smoa import SmoaConfig, clear_spectrum_cache
from tests.support.layers import Wrapper

WARM_UP = 300
"""Cycles after which caches of the libraries are full."""
PARTS = 5
"""Parts of the cycles after the warm-up. A leak grows in each of them; a table that Python or the allocator enlarges
grows once (Python's table of interned strings by 3.7 MB, after some 15,000 new names of files)."""
LIMITS = {"resident": 1024, "blocks": 30, "tensors": 0}
"""By how much a cycle may grow the process, in bytes, and the numbers of Python's blocks and of tensors. safetensors
0.8 keeps a block of 32 bytes for every tensor it reads, 14 in a cycle."""


def cycle(base: nn.Module, folder: Path, number: int) -> None:
    """One life; `base` is as it was afterwards."""
    kinds = ("spectral", "contiguous", "random")
    config = SmoaConfig(
        r=4, num_blocks=2 + number % 3, alpha=8.0, partition=kinds[number % 3], target_modules=["layer"]
    )
    model = get_peft_model(base, config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(torch.randn(8, 24)).square().mean().backward()
    optimiser.step()
    model.save_pretrained(folder)
    model.load_adapter(folder, "again")
    x = torch.randn(3, 24)
    expected = model(x).detach()
    model.set_adapter("again")
    assert torch.equal(model(x), expected)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    model.set_adapter("default")
    model.delete_adapter("again")
    unloaded = model.unload()
    assert unloaded is base
    assert type(base.layer) is nn.Linear
    base.requires_grad_(True)


def usage() -> dict[str, int]:
    """What the process holds, by the names of `LIMITS`."""
    clear_spectrum_cache()
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {
        "resident": int(status.partition("VmRSS:")[2].split()[0]) << 10,
        "blocks": sys.getallocatedblocks(),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
    }


def soak(cycles: int, seed: int = 0) -> dict[str, float]:
    """By how much a cycle makes the process grow, in the part of the cycles after the warm-up where it grows least.

    Raises if a weight changed, or if it grows by more than `LIMITS`.
    """
    torch.manual_seed(seed)
    base = Wrapper(nn.Linear(24, 20))
    before = copy.deepcopy(base.state_dict())
    warm_up = min(WARM_UP, cycles // 4)
    length = (cycles - warm_up) // PARTS
    found = []
    gc.collect()
    gc.freeze()  # what is there already need not be counted each time
    with tempfile.TemporaryDirectory() as room:
        for number in range(warm_up + PARTS * length + 1):
            if number >= warm_up and (number - warm_up) % length == 0:
                found.append(usage())
            cycle(base, Path(room) / "adapter", number)
        assert [path.name for path in Path(room).iterdir()] == ["adapter"], "a save left something behind"
    gc.unfreeze()
    torch.testing.assert_close(dict(base.state_dict()), dict(before), rtol=0, atol=0)
    growth = {name: min(late[name] - early[name] for early, late in pairwise(found)) / length for name in LIMITS}
    assert all(growth[name] <= limit for name, limit in LIMITS.items()), f"a cycle leaves something behind: {growth}"
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=2000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    growth = soak(chosen.cycles)
    print(f"{chosen.cycles} cycles in {time.monotonic() - started:.0f} s, growth in a cycle: {growth}")  # noqa: T201


if __name__ == "__main__":
    main()
