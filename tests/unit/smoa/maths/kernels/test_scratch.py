from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from smoa import cached_weights
from smoa.maths.kernels import choice
from smoa.maths.kernels.choice import Kernels
from smoa.maths.kernels.scratch import CHUNK_ELEMENTS, SCRATCH, Scratch, chunks
from tests.support.gradients import assert_layer_is_the_oracles
from tests.support.layers import adapted_layer, base_layer, oracle_output
from tests.support.tolerance import assert_close

CPU = torch.device("cpu")


@given(start=st.integers(0, 5000), rows=st.integers(0, 5000), columns=st.integers(0, 1_000_000))
def test_chunks_cover_every_row_once_and_are_bounded(start: int, rows: int, columns: int) -> None:
    found = list(chunks(start, start + rows, columns, CPU))
    assert [row for chunk in found for row in range(chunk.start, chunk.stop)] == list(range(start, start + rows))
    sizes = [chunk.stop - chunk.start for chunk in found]
    assert all(size <= 16 or size * columns <= CHUNK_ELEMENTS["cpu"] for size in sizes)


def test_a_buffer_is_used_again_for_the_same_use_and_for_no_other() -> None:
    scratch, like = Scratch(), torch.empty(0)
    first = scratch.take("rows", 4, 5, like)
    assert (first.shape, first.dtype) == ((4, 5), torch.float32)
    assert scratch.take("rows", 2, 3, like).data_ptr() == first.data_ptr()
    assert scratch.take("g", 4, 5, like).data_ptr() != first.data_ptr()
    assert scratch.take("rows", 4, 5, like.double()).dtype == torch.float64


def test_a_buffer_grows_with_what_is_asked_for() -> None:
    scratch, like = Scratch(), torch.empty(0)
    scratch.take("rows", 2, 2, like)
    assert scratch.take("rows", 30, 40, like).shape == (30, 40)
    assert scratch.buffers["rows", torch.float32].numel() == 1200


def test_nothing_larger_than_two_chunks_is_kept(tiny_chunks: None) -> None:
    scratch = Scratch()
    assert scratch.take("rows", 4, 5, torch.empty(0)).shape == (4, 5)
    assert not scratch.buffers


def test_a_buffer_made_in_inference_mode_can_be_written_to_outside() -> None:
    scratch, like = Scratch(), torch.empty(0)
    with torch.inference_mode():
        scratch.take("rows", 4, 5, like)
    buffer = scratch.take("rows", 4, 5, like)
    assert not buffer.is_inference()
    buffer.zero_()


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("route", ["fused", "apart"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_many_runs_of_rows_give_the_oracles_values_and_gradients(num_blocks: int, route: str, conv1d: bool) -> None:
    assert_layer_is_the_oracles(r=7, num_blocks=num_blocks, alpha=3.0, route=route, conv1d=conv1d)


def test_threads_do_not_disturb_each_other() -> None:
    layers = [adapted_layer(base_layer(150, 120), r=8, num_blocks=2) for _ in range(4)]
    inputs = [torch.randn(70, 120, dtype=torch.float64) for _ in layers]

    def repeat(i: int) -> bool:
        with torch.no_grad():
            first = layers[i](inputs[i])
            return all(torch.equal(layers[i](inputs[i]), first) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_outputs_of_two_calls_share_no_memory() -> None:
    layer = adapted_layer(base_layer(30, 20), r=4, num_blocks=2)
    x, other = torch.randn(80, 20, dtype=torch.float64), torch.randn(80, 20, dtype=torch.float64)
    y = layer(x)
    layer(other).sum().backward()
    assert_close(y, oracle_output(layer, x))


def test_a_buffer_made_while_another_device_is_the_default_is_on_the_cpu() -> None:
    scratch, like = Scratch(), torch.empty(0)
    with torch.device("meta"):
        assert scratch.take("rows", 4, 5, like).device.type == "cpu"


@pytest.mark.parametrize("kernels", ["loop", "batched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ["fused", "apart"])
def test_a_call_with_fake_tensors_changes_nothing_for_later_ones(
    route: str, dtype: torch.dtype, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_kernels", kernels)
    layer = adapted_layer(base_layer(150, 120, dtype=dtype), r=8, num_blocks=2, route=route)
    x = torch.randn(7, 120, dtype=dtype)
    with torch.no_grad(), cached_weights(layer):
        expected = layer(x)
        copied = copy.deepcopy(layer)  # has no orders yet
        SCRATCH.buffers.clear()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, cached_weights(copied):
            for fake in (mode.from_tensor(x), x):
                assert layer(fake).shape == copied(fake).shape == (7, 150)
        assert torch.equal(layer(x), expected)
    assert torch.equal(copied(x), layer(x))
    assert not any(isinstance(tensor, FakeTensor) for tensor in [*SCRATCH.buffers.values(), *copied.buffers()])
