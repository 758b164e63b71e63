"""Thousands of lives of an adapter on one tiny layer: memory stays flat, the weights stay intact. `make soak`.

Each cycle injects, trains a step, saves, loads beside it, merges, unmerges, deletes and unloads.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from smoa import SmoaConfig, clear_spectrum_cache, save_adapter
from tests.support.layers import Wrapper

WARM_UP = 300
"""Cycles after which caches of the libraries are full."""
LIMIT = 4 << 20
"""Bytes by which the process may grow from there on: safetensors 0.8 keeps some 60 bytes for every tensor it reads."""


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
    save_adapter(model, folder)
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


def resident() -> int:
    """Bytes of memory that the process holds."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def soak(cycles: int, seed: int = 0) -> dict[str, int]:
    """By how much the process (bytes) and the number of tensors grew since the warm-up; raises if a weight changed."""
    torch.manual_seed(seed)
    base = Wrapper(nn.Linear(24, 20))
    before = copy.deepcopy(base.state_dict())
    warm_up = min(WARM_UP, cycles // 2)
    with tempfile.TemporaryDirectory() as room:
        for number in range(cycles):
            if number == warm_up:
                at_start = _usage()
            cycle(base, Path(room) / "adapter", number)
        assert [path.name for path in Path(room).iterdir()] == ["adapter"], "a save left something behind"
    torch.testing.assert_close(dict(base.state_dict()), dict(before), rtol=0, atol=0)
    return {name: value - at_start[name] for name, value in _usage().items()}


def _usage() -> dict[str, int]:
    clear_spectrum_cache()
    return {"bytes": resident(), "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=2000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    growth = soak(chosen.cycles)
    print(f"{chosen.cycles} cycles in {time.monotonic() - started:.0f} s, growth after the warm-up: {growth}")  # noqa: T201
    assert growth["bytes"] < LIMIT, "memory grows"
    assert growth["tensors"] <= 0, "tensors are kept"


if __name__ == "__main__":
    main()
