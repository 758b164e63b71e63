"""Checkpoints read and written one tensor at a time, held against safetensors' own reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoa import MergeError
from smoa.export import shards
from smoa.export.shards import INDEX, Checkpoint, HeaderEntry, has_safetensors, write_checkpoint

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "plain": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "narrow": torch.randn(7, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "whole": torch.arange(4),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the tensors in one file."""
    (tmp_path / "source").mkdir()
    save_file(TENSORS, tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def read_all(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("size", ["5GB", 40])
def test_what_is_written_is_what_was_read(size: int | str, source: Path, target: Path) -> None:
    checkpoint = Checkpoint(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, size)
    found = read_all(target)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in TENSORS.items())
    assert (target / INDEX).is_file() == (size == 40)


def test_shards_are_found_by_their_index(source: Path, target: Path) -> None:
    checkpoint = Checkpoint(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, 40)
    again = Checkpoint(target)
    assert len(set(again.files.values())) > 1
    assert again.entries == checkpoint.entries
    assert all(torch.equal(again.read(key), tensor) for key, tensor in TENSORS.items())
    assert (
        sum(entry.nbytes for entry in again.entries.values())
        == json.loads((target / INDEX).read_text())["metadata"]["total_size"]
    )


def test_floats_are_cast_and_everything_else_stays(source: Path, target: Path) -> None:
    checkpoint = Checkpoint(source)
    entries = {key: entry.cast(torch.float16) for key, entry in checkpoint.entries.items()}
    write_checkpoint(target, entries, checkpoint.read, "5GB")
    for key, found in read_all(target).items():
        expected = TENSORS[key].half() if TENSORS[key].is_floating_point() else TENSORS[key]
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_a_large_tensor_is_written_in_pieces(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK", 4)
    checkpoint = Checkpoint(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, "5GB")
    assert all(torch.equal(found, TENSORS[key]) for key, found in read_all(target).items())


def test_every_tensor_is_aligned_and_says_who_can_read_it(source: Path, target: Path) -> None:
    checkpoint = Checkpoint(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, "5GB")
    with safe_open(target / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    raw = (target / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for key, entry in checkpoint.entries.items():
        assert header[key]["data_offsets"][0] % shards.SIZES.get(entry.dtype, 1) == 0


def test_an_index_that_names_a_missing_file_is_refused(source: Path, target: Path) -> None:
    checkpoint = Checkpoint(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, 40)
    lost = next(target.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(MergeError, match=f"names {lost.name}, which is missing; download the checkpoint again"):
        Checkpoint(target)


def test_a_folder_without_weights_is_recognized(source: Path, target: Path) -> None:
    assert has_safetensors(source)
    assert not has_safetensors(target)


def test_an_entry_of_a_tensor_is_that_of_its_file(source: Path) -> None:
    entries = Checkpoint(source).entries
    assert all(HeaderEntry.of(tensor) == entries[key] for key, tensor in TENSORS.items() if tensor.is_floating_point())
