"""What two processes do in test_deepspeed.py: train under DeepSpeed's ZeRO over gloo, as strategies.py under FSDP."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa import SmoaError, merged
from tests.slow.workers.strategies import (
    RANK,
    Result,
    adapted,
    generated,
    labels,
    layers,
    logits,
    micro_batches,
    optimizer,
    run_scenarios,
    save_adapter,
    spoil,
    train,
    with_embedding_and_convolution,
    with_experts,
)
from tests.support import tiny

deepspeed.ops.__compatible_ops__ = {}  # or it would compile an operator that training doesn't use, for minutes
RELEASE_AT_ONCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""By default so small a model would stay whole on every rank."""


def accelerator(stage: int, zero: dict[str, Any] = RELEASE_AT_ONCE, **options: Any) -> Accelerator:
    """By the file in docs/performance.md, without the clipping that one process doesn't do."""
    AcceleratorState._reset_state(reset_partial_state=True)
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text(encoding="utf-8")
    config = json.loads(page.split("```json\n")[1].split("```")[0])
    config |= {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0} | options
    config["zero_optimization"] |= {"stage": stage} | zero
    handlers = [InitProcessGroupKwargs(backend="gloo")]  # accelerate names none without a GPU, and counts one process
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=handlers)


def loaded(folder: Path, family: str = "llama") -> PreTrainedModel:
    """The tiny model from files, by which ZeRO-3 has it sharded from the start."""
    whole = tiny.build(family)
    if RANK == 0:
        whole.save_pretrained(folder / "base")
    torch.distributed.barrier()
    base = type(whole).from_pretrained(folder / "base")
    assert not any(parameter.numel() for parameter in base.parameters())
    return base


def trained(chosen: Accelerator, model: nn.Module, folder: Path) -> Result:
    engine, _, losses = train(chosen, model)
    save_adapter(chosen, engine, folder / "adapter")
    empty = sum(parameter.numel() == 0 for parameter in engine.parameters())
    restored = _saves_and_restores(chosen, engine, folder)
    return {"losses": losses, "labels": labels(engine), "restored": restored, "empty": empty}


def _saves_and_restores(chosen: Accelerator, engine: nn.Module, folder: Path) -> list[bool]:
    chosen.save_state(str(folder / "checkpoint"))
    kept, saved, said = labels(engine), _factors(engine), logits(engine)

    def is_restored() -> bool:
        same = torch.equal(logits(engine), said)
        return same and labels(engine) == kept and all(map(torch.equal, _factors(engine), saved))

    with deepspeed.zero.GatheredParameters(list(engine.parameters()), modifier_rank=0):
        spoil(engine)
    spoiled = not is_restored()
    chosen.load_state(str(folder / "checkpoint"))
    return [spoiled, is_restored()]


def _factors(engine: nn.Module) -> list[Tensor]:
    chosen = [parameter for parameter in engine.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(chosen):
        return [parameter.detach().clone() for parameter in chosen]


def late(folder: Path) -> Result:
    """The adapter is injected before there is a process group; must be the first."""
    model = adapted()
    pending = all(layer.adapters["default"].blocks is None for layer in layers(model).values())
    return trained(accelerator(3), model, folder) | {"pending": pending}


def zero2(folder: Path) -> Result:
    return trained(accelerator(2), adapted(), folder)


def zero3_checkpointing(folder: Path) -> Result:
    chosen = accelerator(3)
    base = loaded(folder)
    base.gradient_checkpointing_enable()
    return trained(chosen, adapted(base), folder)


def zero3_experts(folder: Path) -> Result:
    chosen = accelerator(3)
    return trained(chosen, with_experts(), folder)


def zero3_embedding_and_convolution(folder: Path) -> Result:
    chosen = accelerator(3)
    return trained(chosen, with_embedding_and_convolution(), folder)


def zero3_bfloat16(folder: Path) -> Result:
    chosen = accelerator(3, bf16={"enabled": True})
    return {"losses": train(chosen, adapted(loaded(folder)))[2]}


def zero3_generation(folder: Path) -> Result:
    """Before any forward of the engine, by which DeepSpeed would learn what a layer reads."""
    chosen = accelerator(3)
    model = adapted(loaded(folder), init_weights=False)
    engine, _ = chosen.prepare(model, optimizer(model))
    return {"tokens": generated(chosen.unwrap_model(engine))}


def zero3_refusal(folder: Path) -> Result:
    chosen = accelerator(3)
    model = adapted(loaded(folder))
    engine, _ = chosen.prepare(model, optimizer(model))
    try:
        merged(chosen.unwrap_model(engine)).__enter__()
    except SmoaError as error:
        return {"merged": str(error)}
    return {"merged": None}


def zero3_merge(folder: Path) -> Result:
    """By default so small a model stays whole after a forward pass, but the next would drop what was merged into it."""
    chosen = accelerator(3, zero={})
    engine, _, losses = train(chosen, adapted(loaded(folder)))
    save_adapter(chosen, engine, folder / "adapter")
    model = chosen.unwrap_model(engine)
    everything = list(model.parameters())
    found: Result = {"losses": losses, "labels": labels(engine), "unmerged": _loss(chosen, engine)}
    with deepspeed.zero.GatheredParameters(everything, modifier_rank=0):
        model.merge_adapter()
    found["merged"] = _loss(chosen, engine)
    with deepspeed.zero.GatheredParameters(everything, modifier_rank=0):
        model.unmerge_adapter()
    return found | {"unmerged_again": _loss(chosen, engine)}


@torch.no_grad()
def _loss(chosen: Accelerator, engine: nn.Module) -> float:
    rows = micro_batches()[RANK]
    engine.eval()
    return chosen.reduce(engine(input_ids=rows, labels=rows).loss, "mean").item()


SCENARIOS: list[Callable[[Path], Result]] = [
    late,
    zero2,
    zero3_checkpointing,
    zero3_experts,
    zero3_embedding_and_convolution,
    zero3_bfloat16,
    zero3_generation,
    zero3_refusal,
    zero3_merge,
]


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]), SCENARIOS)
