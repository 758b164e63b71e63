from __future__ import annotations

import pytest
import torch

from smoa import MergeError
from smoa.layers.layer import refuse_shared
from smoa.maths.blocks import DiagonalBlocks
from smoa.maths.spectrum import make_partition
from tests.support.layers import adapted_layer, base_layer, base_weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_was_read_is_written_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 13).to(dtype)
    before = weight.clone()
    kept = DiagonalBlocks.read_from(weight, make_partition(weight, 3))
    weight.copy_(torch.randn(11, 13))
    changed = weight.clone()
    kept.write_to(weight)
    same_block = kept.blocks.row_labels[:, None] == kept.blocks.col_labels
    assert torch.equal(weight, torch.where(same_block, before, changed))


def test_what_was_read_is_a_copy_that_labels_and_weights_can_not_change() -> None:
    weight = torch.randn(11, 13)
    before, partition = weight.clone(), make_partition(weight, 3)
    kept = DiagonalBlocks.read_from(weight, partition)
    partition.row_labels.copy_(partition.row_labels.flip(0))
    weight.zero_()
    kept.write_to(weight)
    same_block = kept.blocks.row_labels[:, None] == kept.blocks.col_labels
    assert torch.equal(weight, torch.where(same_block, before, 0))


def test_what_was_read_is_written_in_the_dtype_that_the_weight_has_by_then() -> None:
    weight = torch.randn(11, 13)
    kept = DiagonalBlocks.read_from(weight, make_partition(weight, 3))
    half = torch.zeros(11, 13, dtype=torch.bfloat16)
    kept.write_to(half)
    same_block = kept.blocks.row_labels[:, None] == kept.blocks.col_labels
    assert torch.equal(half, torch.where(same_block, weight, 0).to(torch.bfloat16))


def test_two_layers_of_one_weight_are_refused_by_name() -> None:
    weight = torch.randn(4, 4)
    with pytest.raises(MergeError, match="third and first share one weight"):
        refuse_shared(
            [("first", weight, {"a": 1}), ("second", torch.randn(4, 4), {"a": 2}), ("third", weight, {"a": 3})]
        )


def test_two_layers_of_one_weight_with_one_adapter_are_not_refused() -> None:
    weight, factors = torch.randn(4, 4), object()
    refuse_shared([("first", weight, {"a": factors}), ("second", weight, {"a": factors})])
    with pytest.raises(MergeError, match="set ensure_weight_tying=True"):
        refuse_shared([("first", weight, {"a": factors}), ("second", weight, {"a": factors, "b": object()})])


def test_weights_of_their_own_are_not_refused_and_neither_is_the_meta_device() -> None:
    refuse_shared([("first", torch.randn(4, 4), {"a": 1}), ("second", torch.randn(4, 4), {"a": 2})])
    meta = torch.empty(4, 4, device="meta")
    refuse_shared([("first", meta, {"a": 1}), ("second", meta, {"a": 2})])


def test_merging_changes_the_diagonal_blocks_only() -> None:
    layer = adapted_layer(base_layer(11, 13), r=7, num_blocks=3)
    before = base_weight(layer).clone()
    partition = layer.blocks("default")
    same_block = partition.row_labels[:, None] == partition.col_labels
    layer.merge()
    assert torch.equal(base_weight(layer) != before, same_block)


def test_a_merged_layer_keeps_one_kth_of_the_weight() -> None:
    layer = adapted_layer(base_layer(40, 40), r=4, num_blocks=4)
    layer.merge()
    kept = sum(entries.numel() for blocks in layer._pristine_blocks["default"].values() for entries in blocks.entries)
    assert kept == 40 * 40 // 4
    layer.unmerge()
    assert not layer._pristine_blocks
