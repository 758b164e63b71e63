from __future__ import annotations

import pytest
import torch

from smoa import MergeError
from smoa.layers.layer import SmoaLayer
from tests.support.layers import clone_leaf
from tests.support.tiny_mixtures import FAMILIES, add_second_adapter, experts_of, matrix_of, oracle_deltas, wrappers
from tests.support.tolerance import assert_close


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_weight_is_the_oracles_of_each_expert_and_unmerging_restores_every_bit(family: str) -> None:
    wrapped = experts_of(family)
    for wrapper in wrappers(wrapped).values():
        before, halves = wrapper.stored_weight().detach().clone(), wrapper.layout.halves
        pairs = [
            (matrix_of(wrapper, number // halves, number % halves) + delta).detach()
            for number, delta in enumerate(oracle_deltas(wrapper))
        ]
        wrapper.merge()
        for number, expected in enumerate(pairs):
            assert_close(matrix_of(wrapper, number // halves, number % halves), expected)
        wrapper.unmerge()
        assert torch.equal(wrapper.stored_weight(), before)


def test_adapters_merged_one_after_the_other_are_both_made_from_the_pristine_weight() -> None:
    wrapped = experts_of("gpt_oss", dtype=torch.float32)
    add_second_adapter(wrapped)
    for wrapper in wrappers(wrapped).values():
        before = wrapper.stored_weight().detach().clone()
        expected = before + wrapper.get_delta_weight("default") + wrapper.get_delta_weight("second")
        wrapper.merge(adapter_names=["default"])
        assert_close(wrapper.get_delta_weight("second"), expected - wrapper.stored_weight())
        with pytest.warns(UserWarning, match="additionally merging second"):
            wrapper.merge(adapter_names=["second"])
        assert_close(wrapper.stored_weight(), expected)
        wrapper.unmerge()
        assert torch.equal(wrapper.stored_weight(), before)


def test_a_safe_merge_of_broken_factors_changes_nothing() -> None:
    wrapper = wrappers(experts_of("qwen3_moe"))["down_proj"]
    before = clone_leaf(wrapper.stored_weight())
    wrapper.smoa_B["default"].weight.data[0, -1] = float("inf")
    with pytest.raises(
        MergeError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        wrapper.merge(safe_merge=True)
    assert torch.equal(wrapper.stored_weight(), before)
    assert not wrapper.merged


def test_unmerging_twice_warns_and_merging_twice_changes_nothing() -> None:
    wrapper = wrappers(experts_of("llama4"))["down_proj"]
    wrapper.merge()
    merged = clone_leaf(wrapper.stored_weight())
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        wrapper.merge()
    assert torch.equal(wrapper.stored_weight(), merged)
    wrapper.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        wrapper.unmerge()


def test_disabling_the_adapter_of_merged_experts_unmerges_them() -> None:
    wrapped = experts_of("qwen3_moe")
    before = {name: clone_leaf(wrapper.stored_weight()) for name, wrapper in wrappers(wrapped).items()}
    for layer in wrapped.modules():
        if isinstance(layer, SmoaLayer):
            layer.merge()
            layer.enable_adapters(False)
    wrapped["experts"](torch.randn(0, 24).double(), torch.ones(0, 2).long(), torch.ones(0, 2).double())
    assert all(torch.equal(wrapper.stored_weight(), before[name]) for name, wrapper in wrappers(wrapped).items())
