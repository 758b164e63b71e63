import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smoa import SmoaConfig, clear_spectrum_cache, make_partition, scores
from smoa.scores import CACHE_VARIABLE, cached_spectral_scores
from smoa.spectrum import decomposition_device
from tests.support.layers import adapted_layer, base_layer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scores are kept by default, in an empty home."""
    for variable in (CACHE_VARIABLE, "SMOA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    clear_spectrum_cache()
    return tmp_path / ".cache" / "smoa" / "scores"


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each decomposition that has run."""
    decomposition_device(torch.device("cpu"))  # it tries a decomposition, once
    ran: list[int] = []
    eigh = torch.linalg.eigh

    def counting(matrix: torch.Tensor, **kwargs: str) -> object:
        ran.append(len(matrix))
        return eigh(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    return ran


def test_a_second_adapter_with_another_number_of_blocks_costs_no_decomposition(decompositions: list[int]) -> None:
    layer = adapted_layer(base_layer(24, 20), num_blocks=2)
    layer.update_layer("other", SmoaConfig(r=6, num_blocks=5))
    assert len(decompositions) == 1
    expected = make_partition(layer.pristine_weight(), 5)
    assert torch.equal(layer.blocks("other").row_labels, expected.row_labels)
    assert torch.equal(layer.blocks("other").col_labels, expected.col_labels)


def test_a_changed_weight_is_decomposed_anew(decompositions: list[int]) -> None:
    weight = torch.randn(9, 7)
    cached_spectral_scores(weight)
    weight.data[0, 0] += 1
    cached_spectral_scores(weight)
    assert len(decompositions) == 2
    rows, cols = cached_spectral_scores(weight.reshape(7, 9))
    assert (len(rows), len(cols)) == (7, 9)


@pytest.mark.parametrize(
    ("dtype", "precise"),
    [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False), (torch.float16, True)],
)
def test_the_next_process_reads_the_same_bits_and_decomposes_nothing(
    dtype: torch.dtype, precise: bool, folder: Path, decompositions: list[int]
) -> None:
    weight = torch.randn(12, 10).to(dtype)
    first = cached_spectral_scores(weight, precise)
    second = cached_spectral_scores(weight, precise)
    assert len(decompositions) == 1
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    (file,) = files_in(folder)
    assert file.stat().st_size == 22 * first[0].itemsize  # two vectors, nothing of the weight


@pytest.mark.parametrize("chosen", ["off", "0", ""])
def test_a_variable_keeps_everything_off_the_disk(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decompositions: list[int]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, chosen)
    monkeypatch.chdir(tmp_path)
    weight = torch.randn(12, 10)
    for _ in range(2):
        cached_spectral_scores(weight)
    clear_spectrum_cache()
    cached_spectral_scores(weight)
    assert len(decompositions) == 3
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("variable", "value", "place"),
    [
        (CACHE_VARIABLE, "~/mine", "mine"),
        ("SMOA_CACHE", "~/all", "all/scores"),
        ("XDG_CACHE_HOME", "~/xdg", "xdg/smoa/scores"),
    ],
)
def test_the_folder_can_be_chosen(
    variable: str, value: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    cached_spectral_scores(torch.randn(12, 10))
    assert len(files_in(tmp_path / place)) == len(files_in(tmp_path)) == 1


def test_the_disk_is_bounded_and_what_was_used_last_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "DISK_LIMIT", 3 * 20 * 4)
    weights = [torch.randn(10, 10) for _ in range(4)]
    names = list[str]()
    for age, weight in enumerate(weights[:3]):
        cached_spectral_scores(weight)
        names += {file.name for file in files_in(folder)} - {*names}
        for file in files_in(folder):
            os.utime(file, ns=(age, file.stat().st_mtime_ns - 10**12))  # the first is the oldest
    (folder / "checkpoint.bin").write_bytes(bytes(2 * scores.DISK_LIMIT))  # the user's own
    cached_spectral_scores(weights[0])  # read, and so used last
    cached_spectral_scores(weights[3])
    (last,) = {file.name for file in files_in(folder)} - {*names, "checkpoint.bin"}
    assert {file.name for file in files_in(folder)} == {names[0], names[2], last, "checkpoint.bin"}


def test_a_full_disk_stops_nothing_and_what_it_left_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    weight = torch.randn(12, 10)
    monkeypatch.setattr(Path, "write_bytes", full)
    first = cached_spectral_scores(weight)
    assert [len(scores) for scores in first] == [12, 10]
    assert all(map(torch.equal, cached_spectral_scores(weight), first))


def test_processes_that_write_the_same_scores_at_once_disturb_nobody(folder: Path) -> None:
    script = (
        "import torch; from smoa.scores import cached_spectral_scores as of\n"
        "torch.manual_seed(0); torch.set_num_threads(1)\n"
        "for weight in [torch.randn(40, 30) for _ in range(5)] * 4: print(of(weight)[0].tolist())"
    )
    started = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 20
    assert len(files_in(folder)) == 5
