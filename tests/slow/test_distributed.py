"""Two processes over gloo against one that accumulates as much: through accelerate and PyTorch, no engine of ours."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from smoa_lab.config.run import check_config
from smoa_lab.training.train import run
from tests.slow.processes import ROOT, environment, free_port, run_two
from tests.slow.workers.strategies import (
    adapted,
    labels,
    micro_batches,
    train_alone,
    with_embedding_and_convolution,
    with_experts,
)
from tests.support import lab, tiny

CURVE_TOLERANCE = 1e-5
"""Relative; ranks sum the two halves of a batch in another order."""
FACTOR_TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}
"""AdamW divides by √v, which magnifies the rounding of a small gradient."""
STRATEGIES = [
    "late_process_group",
    "ddp",
    "fsdp2_full",
    "fsdp2_sharded",
    "fsdp2_documented",
    "fsdp1_flat",
    "fsdp1_original",
]
SAVING = ["ddp", "fsdp2_full", "fsdp2_sharded", "fsdp2_documented"]

# Not ours: DCP tells those who load in one process that it is one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind after all strategies."""
    path = tmp_path_factory.mktemp("two")
    run_two("tests.slow.workers.strategies", str(path))
    return path


def of_strategy(ranks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Its results on both ranks; an exception of a rank fails the test."""
    for results in ranks:
        assert "failure" not in results[name], results[name]["failure"]
    return [results[name] for results in ranks]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_curve_is_that_of_one_process_with_twice_the_accumulation(
    ranks: list[dict[str, Any]], one_process: tuple[PeftModel, list[float]], strategy: str
) -> None:
    first, second = of_strategy(ranks, strategy)
    assert first["losses"] == second["losses"] == pytest.approx(one_process[1], rel=CURVE_TOLERANCE)
    assert first["losses"][-1] < 0.9 * first["losses"][0]
    assert first["labels"] == second["labels"] == labels(one_process[0])
    if strategy == "late_process_group":
        assert first["pending"]
        assert second["pending"]


def test_bfloat16_under_fsdp1_follows_the_same_curve_and_saves_the_scales_that_it_was_trained_with(
    ranks: list[dict[str, Any]], one_process: tuple[PeftModel, list[float]]
) -> None:
    for result in of_strategy(ranks, "fsdp1_bfloat16"):
        assert result["losses"] == pytest.approx(one_process[1], rel=0.03)
        assert any(result["rounded"])
        assert all(result["exact"])


def test_a_merge_under_fsdp2_adds_the_adapter_and_its_undo_restores_every_bit(ranks: list[dict[str, Any]]) -> None:
    for result in of_strategy(ranks, "fsdp2_documented"):
        merged, unmerged = result["merge"]
        assert merged < 1e-4
        assert unmerged == 0


def test_rank_zero_decides_even_where_another_rank_would_find_another_partition(ranks: list[dict[str, Any]]) -> None:
    first, second = of_strategy(ranks, "disagreeing_weights")
    assert first["own"] != second["own"]
    assert first["labels"] == second["labels"]
    assert first["labels"][::2] == first["own"]
    assert first["random"] == second["random"]
    assert (first["decompositions"], second["decompositions"]) == (len(first["own"]), 0)


def assert_is_one_process(
    ranks: list[dict[str, Any]], folder: Path, strategy: str, one: tuple[PeftModel, list[float]], room: Path
) -> None:
    """Curve, labels, checkpoints and saved adapter."""
    first, second = of_strategy(ranks, strategy)
    assert first["losses"] == second["losses"] == pytest.approx(one[1], rel=CURVE_TOLERANCE)
    assert first["labels"] == second["labels"] == labels(one[0])
    if strategy not in ("ddp", "fsdp2_documented", "zero3_merge"):  # which make no checkpoint
        assert len(first["restored"]) == len(second["restored"]) > 0
        assert all(first["restored"] + second["restored"])
    one[0].save_pretrained(room)
    expected = load_file(room / "adapter_model.safetensors")
    assert_same_adapter(load_file(folder / strategy / "adapter" / "adapter_model.safetensors"), expected)


@pytest.mark.parametrize("strategy", SAVING)
def test_the_adapter_saved_from_rank_zero_is_that_of_one_process(
    ranks: list[dict[str, Any]],
    folder: Path,
    one_process: tuple[PeftModel, list[float]],
    tmp_path: Path,
    strategy: str,
) -> None:
    assert_is_one_process(ranks, folder, strategy, one_process, tmp_path)
    reloaded = PeftModel.from_pretrained(tiny.build("llama"), folder / strategy / "adapter")
    assert_same_logits(reloaded, one_process[0])


@pytest.mark.parametrize(
    ("strategy", "build"),
    [("fsdp2_experts", with_experts), ("fsdp2_embedding_and_convolution", with_embedding_and_convolution)],
)
def test_other_kinds_of_layers_under_fsdp2_follow_one_process(
    ranks: list[dict[str, Any]], folder: Path, strategy: str, build: Callable[[], PeftModel], tmp_path: Path
) -> None:
    assert_is_one_process(ranks, folder, strategy, train_alone(build()), tmp_path)


@pytest.mark.parametrize("kind", ["checkpoint", "adapter_only"])
def test_a_full_checkpoint_loads_back_on_one_process(
    ranks: list[dict[str, Any]], folder: Path, one_process: tuple[PeftModel, list[float]], kind: str
) -> None:
    of_strategy(ranks, "fsdp2_full")
    state = torch.load(folder / "fsdp2_full" / kind / "pytorch_model_fsdp.bin", weights_only=True)
    model = untrained()
    outcome = model.load_state_dict(state, strict=kind == "checkpoint")
    assert not outcome.unexpected_keys
    assert not any("smoa_" in key for key in outcome.missing_keys)
    assert_same_logits(model, one_process[0])


def test_a_sharded_checkpoint_loads_back_on_one_process(
    ranks: list[dict[str, Any]], folder: Path, one_process: tuple[PeftModel, list[float]]
) -> None:
    of_strategy(ranks, "fsdp2_sharded")
    whole = untrained()
    state = {"model": whole.state_dict()}
    dcp.load(state, checkpoint_id=folder / "fsdp2_sharded" / "checkpoint" / "pytorch_model_fsdp_0")
    whole.load_state_dict(state["model"])
    assert_same_logits(whole, one_process[0])

    alone = untrained()
    state = {"model": get_peft_model_state_dict(alone)}
    dcp.load(state, checkpoint_id=folder / "fsdp2_sharded" / "adapter_only" / "pytorch_model_fsdp_0")
    set_peft_model_state_dict(alone, state["model"])
    assert_same_logits(alone, one_process[0])


@pytest.mark.slow  # three Python processes that import everything
def test_accelerate_launch_gives_what_one_process_gives_with_twice_the_accumulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    rows = lab.write_rows(tmp_path / "rows.jsonl", lab.chats(24))
    base = lab.rows_base(tmp_path / "base")
    training = {"max_steps": 4, "learning_rate": 0.01}
    config = lab.rows_values(tmp_path, rows, base, training=training)
    one, two = trained_by_one_and_by_two(config, tmp_path)
    assert lab.losses(two) == pytest.approx(lab.losses(one), rel=CURVE_TOLERANCE)
    assert two["data"] == one["data"]
    assert two["evaluation"]["before"] == one["evaluation"]["before"]


def trained_by_one_and_by_two(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of one process with twice the accumulation, and of two, whose adapters are the same; in folders of
    these names."""
    config["training"]["output_dir"] = str(folder / "two")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    launch_two(folder / "config.yaml")

    config["training"] |= {"output_dir": str(folder / "one"), "gradient_accumulation_steps": 2}
    one = run(check_config(config))
    two = json.loads((folder / "two" / "metrics.json").read_text())
    assert (one["training"]["processes"], two["training"]["processes"]) == (1, 2)
    saved, expected = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    assert_same_adapter(saved, expected)
    return one, two


def launch_two(config: Path) -> None:
    """`smoa train` in two processes that accelerate starts."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    options = [f"--main_process_port={free_port()}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [*accelerate, *options, "-m", "smoa", "train", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trainable parameters") == 1


def untrained() -> PeftModel:
    """With labels that are not those to be loaded."""
    return adapted(partition="contiguous")


def assert_same_adapter(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, **FACTOR_TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


@torch.no_grad()
def assert_same_logits(actual: PeftModel, expected: PeftModel) -> None:
    rows = micro_batches()[0]
    ours, theirs = (model.eval()(input_ids=rows).logits for model in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_fsdp2_takes_one_product_and_gives_the_merged_models_bits() -> None:
    worker = "tests.slow.workers.one_product"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", worker]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    products, equal = found.stdout.split()[-2:]
    assert int(products) == 4
    assert equal == "True"
