"""DeepSpeed's ZeRO on two processes over gloo, held against one process as in test_distributed.py."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from tests.slow.processes import run_two
from tests.slow.test_distributed import (
    CURVE_TOLERANCE,
    assert_is_one_process,
    assert_same_logits,
    of_strategy,
)
from tests.slow.workers.strategies import (
    adapted,
    generated,
    train_alone,
    with_embedding_and_convolution,
    with_experts,
)
from tests.support import tiny

pytestmark = [
    pytest.mark.slow,  # half a minute
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
STRATEGIES = ["late", "zero2", "zero3_merge", "zero3_checkpointing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind after all strategies."""
    path = tmp_path_factory.mktemp("zero")
    run_two("tests.slow.workers.zero", str(path), first=["deepspeed"])
    return path


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_follows_the_loss_curve_and_partition_of_one_process(
    ranks: list[dict[str, Any]],
    folder: Path,
    one_process: tuple[PeftModel, list[float]],
    tmp_path: Path,
    strategy: str,
) -> None:
    """So are the adapter saved from rank 0 and what a checkpoint restores."""
    assert_is_one_process(ranks, folder, strategy, one_process, tmp_path)
    reloaded = PeftModel.from_pretrained(tiny.build("llama"), folder / strategy / "adapter")
    assert_same_logits(reloaded, one_process[0])


def test_zero3_leaves_nothing_whole_between_two_steps(ranks: list[dict[str, Any]]) -> None:
    parameters = len(list(adapted().parameters()))
    for strategy in ("late", "zero3_checkpointing"):
        assert [result["empty"] for result in of_strategy(ranks, strategy)] == [parameters] * 2
    assert [result["empty"] for result in of_strategy(ranks, "zero2")] == [0, 0]


def test_an_adapter_injected_before_zero3_waits_for_the_process_group(ranks: list[dict[str, Any]]) -> None:
    assert all(result["pending"] for result in of_strategy(ranks, "late"))


@pytest.mark.parametrize(
    ("strategy", "build"),
    [
        ("zero3_experts", with_experts),
        ("zero3_embedding_and_convolution", with_embedding_and_convolution),
    ],
)
def test_other_kinds_of_layers_under_zero3_follow_one_process(
    ranks: list[dict[str, Any]], folder: Path, strategy: str, build: Callable[[], PeftModel], tmp_path: Path
) -> None:
    assert_is_one_process(ranks, folder, strategy, train_alone(build()), tmp_path)


def test_bfloat16_under_zero3_follows_the_same_curve(
    ranks: list[dict[str, Any]], one_process: tuple[PeftModel, list[float]]
) -> None:
    first, second = of_strategy(ranks, "zero3_bfloat16")
    assert first["losses"] == second["losses"] == pytest.approx(one_process[1], rel=0.03)


def test_a_model_under_zero3_generates_before_it_is_trained(ranks: list[dict[str, Any]]) -> None:
    expected = generated(adapted(init_weights=False))
    assert [result["tokens"] for result in of_strategy(ranks, "zero3_generation")] == [expected] * 2


def test_weights_that_zero3_has_partitioned_are_not_merged_for_a_while(ranks: list[dict[str, Any]]) -> None:
    for result in of_strategy(ranks, "zero3_refusal"):
        assert "sharded over processes" in result["merged"]


def test_a_merge_within_gathered_parameters_lasts_and_is_undone(ranks: list[dict[str, Any]]) -> None:
    for result in of_strategy(ranks, "zero3_merge"):
        assert result["merged"] == pytest.approx(result["unmerged"], rel=CURVE_TOLERANCE)
        assert result["unmerged_again"] == result["unmerged"] < 0.9 * result["losses"][0]
