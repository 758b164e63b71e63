from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import smoa
from smoa.maths.blocks import Blocks
from smoa.maths.kernels.choice import prefers_apart, prefers_batched
from smoa.maths.spectrum import make_partition


def blocks(size: int, num_blocks: int, kind: str = "random", device: str = "cpu") -> Blocks:
    found = make_partition(torch.ones(size, size), num_blocks, kind)  # type: ignore[arg-type]
    rows, cols = (labels.to(device) for labels in (found.row_labels, found.col_labels))
    return Blocks(rows, cols, num_blocks, found.orders, found.is_contiguous)


def test_small_blocks_are_batched_on_a_cpu() -> None:
    assert prefers_batched(blocks(256, 8), tokens=4096)
    assert not prefers_batched(blocks(640, 4), tokens=1)
    assert prefers_batched(blocks(640, 4, "contiguous"), tokens=1)
    assert not prefers_batched(blocks(640, 4, "contiguous"), tokens=4096)


def test_few_tokens_are_computed_apart_on_a_cpu() -> None:
    assert prefers_apart(blocks(64, 8), tokens=63)
    assert not prefers_apart(blocks(64, 8), tokens=64)
    assert not prefers_apart(blocks(64, 2), tokens=1)
    assert prefers_apart(blocks(64, 8, "contiguous"), tokens=127)
    assert not prefers_apart(blocks(64, 8, "contiguous"), tokens=128)


def test_elsewhere_everything_is_batched_and_apart() -> None:
    on_a_device = blocks(640, 2, device="meta")
    assert prefers_batched(on_a_device, tokens=1 << 20)
    assert prefers_apart(on_a_device, tokens=1 << 20)


def test_what_is_set_holds_everywhere(kernels: str) -> None:
    for chosen in (blocks(64, 8), blocks(640, 2), blocks(640, 2, device="meta")):
        assert prefers_batched(chosen, tokens=512) == (kernels == "batched")
    assert prefers_apart(blocks(640, 2), tokens=512) == (kernels == "batched")


def test_another_word_is_refused_and_changes_nothing() -> None:
    with pytest.raises(smoa.ConfigError, match="'fast'; use one of 'auto', 'loop', 'batched'"):
        smoa.use_kernels("fast")  # type: ignore[arg-type]
    assert prefers_batched(blocks(256, 8), tokens=1)


@pytest.mark.parametrize(("value", "error"), [("loop", None), ("fast", "'fast'; use one of")])
def test_the_environment_sets_what_smoa_starts_with(value: str, error: str | None) -> None:
    code = "import smoa.maths.kernels.choice as choice; print(choice._kernels)"
    environment = os.environ | {"SMOA_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (error in done.stderr) if error else (done.stdout.strip() == value)
