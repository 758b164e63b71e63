"""What two processes do in test_distributed.py: each strategy in turn, what came of it in a file for each rank.

accelerate offers FSDP on accelerators alone. So it is told here that the two CPU processes are GPUs; all that follows
is its own code and PyTorch's, over gloo.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, load_fsdp_model, save_fsdp_model
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import smoa.adapter
from smoa import SmoaConfig, make_partition, merged
from smoa.layer import SmoaLayer
from tests.support import tiny
from tests.support.tiny import EXPERTS, build, build_reader

RANK = int(os.environ.get("RANK", "0"))
TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 4
LEARNING_RATE = 0.05
Result = dict[str, Any]


def micro_batches() -> Tensor:
    """(2, rows, tokens): one for each rank, or two to accumulate; as many tokens in both, the same in every step."""
    return torch.randint(3, tiny.VOCAB_SIZE, (2, 2, 11), generator=torch.Generator().manual_seed(1))


def adapted(base: nn.Module | None = None, targets: list[str] = TARGETS, **options: Any) -> PeftModel:
    """The model that all strategies start from."""
    base = tiny.build("llama") if base is None else base
    torch.manual_seed(0)
    settings = {"r": 4, "num_blocks": 2, "alpha": 8, "target_modules": targets} | options
    return get_peft_model(base, SmoaConfig(**settings))


def with_experts() -> PeftModel:
    """A mixture, whose experts and queries are adapted."""
    return adapted(build("qwen3_moe"), targets=["q_proj"], target_parameters=EXPERTS)


def with_embedding_and_convolution() -> PeftModel:
    """Tables and kernels, which adapted layers read without calling their modules."""
    return adapted(build_reader(), targets=tiny.READER_TARGETS)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def layers(model: nn.Module) -> dict[str, SmoaLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SmoaLayer)}


def labels(model: nn.Module) -> list[list[int]]:
    """Of all layers, rows then columns."""
    found = layers(model).values()
    return [side["default"].tolist() for layer in found for side in (layer.smoa_row_labels, layer.smoa_col_labels)]


def train_alone(model: PeftModel) -> tuple[PeftModel, list[float]]:
    """The model trained in one process that accumulates two micro-batches, and its losses."""
    steps = optimizer(model)
    losses = []
    model.train()
    for _ in range(STEPS):
        parts = [model(input_ids=rows, labels=rows).loss / 2 for rows in micro_batches()]
        sum(parts).backward()
        steps.step()
        steps.zero_grad()
        losses.append(sum(part.item() for part in parts))
    return model.eval(), losses


def generated(model: nn.Module) -> list[list[int]]:
    return model.eval().generate(input_ids=micro_batches()[0, :, :5], max_new_tokens=6, do_sample=False).tolist()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """The same on every rank, which all must ask for."""
    model.eval()  # which gives DeepSpeed's engine not back
    found: Tensor = model(input_ids=micro_batches()[0]).logits.clone()
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a forward without a backward leaves the root whole
            module.reshard()
    return found


def train(accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, Any, list[float]]:
    """The prepared model and optimizer after training, and the loss of every step, averaged over the ranks."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        model = accelerator.prepare(model)  # FSDP1 makes new parameters
        steps = accelerator.prepare(optimizer(model))
    else:
        model, steps = accelerator.prepare(model, optimizer(model))
    model.train()
    losses, rows = [], micro_batches()[RANK]
    for _ in range(STEPS):
        steps.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        steps.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return model, steps, losses


def fresh_accelerator(**options: Any) -> Accelerator:
    """An Accelerator that knows nothing of the last one; with a `fsdp_plugin` the processes pass for GPUs."""
    AcceleratorState._reset_state(reset_partial_state=False)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    state = PartialState(cpu=True)._shared_state
    state["device"] = torch.device("cpu")
    pretends = "fsdp_plugin" in options
    state["distributed_type"] = DistributedType.MULTI_GPU if pretends else DistributedType.MULTI_CPU
    return Accelerator(cpu=not pretends, **options)


def plugin(version: int, **options: Any) -> FullyShardedDataParallelPlugin:
    units = {"transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    options = {"cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"} | units | options
    return FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy="transformer_based_wrap", **options)


def save_adapter(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    """The documented way: all ranks gather, rank 0 writes."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()


def late_process_group(folder: Path) -> Result:
    """The adapter is injected before there is a process group; must be the first."""
    model = adapted()
    pending = all(layer.adapters["default"].blocks is None for layer in layers(model).values())
    accelerator = fresh_accelerator()
    model, _, losses = train(accelerator, model)
    return {"pending": pending, "losses": losses, "labels": labels(model)}


def ddp(folder: Path) -> Result:
    accelerator = fresh_accelerator()
    model, _, losses = train(accelerator, adapted())
    save_adapter(accelerator, model, folder / "adapter")
    return {"losses": losses, "labels": labels(model)}


def disagreeing_weights(folder: Path) -> Result:
    """Rank 1 has other weights and another random state; spectral and random partitions follow rank 0."""
    base = tiny.build("llama")
    torch.manual_seed(RANK)
    for parameter in base.parameters():
        parameter.data += RANK * torch.randn_like(parameter)
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return make_partition(*arguments)

    smoa.adapter.make_partition = counted
    model = get_peft_model(base, SmoaConfig(num_blocks=2, target_modules=TARGETS))
    smoa.adapter.make_partition = make_partition
    torch.manual_seed(RANK)
    shuffled = get_peft_model(tiny.build("llama"), SmoaConfig(num_blocks=2, target_modules=TARGETS, partition="random"))
    own = [make_partition(layer.base_weight(), 2).row_labels.tolist() for layer in layers(model).values()]
    return {"labels": labels(model), "own": own, "random": labels(shuffled), "decompositions": calls}


def fsdp2(folder: Path, checkpoints_activations: bool = False, **options: Any) -> Result:
    """The model checkpoints activations: with accelerate's wrappers for that PEFT saves no tensors, of LoRA neither."""
    accelerator = fresh_accelerator(fsdp_plugin=plugin(2, **options))
    loads_on_rank_zero = bool(options.get("cpu_ram_efficient_loading"))
    base = tiny.build("llama")
    if checkpoints_activations:
        base.gradient_checkpointing_enable()
    if loads_on_rank_zero and RANK > 0:
        for parameter in base.parameters():  # never loaded: rank 0 will send it
            parameter.data.fill_(float("nan"))
    model, _, losses = train(accelerator, adapted(base))
    save_adapter(accelerator, model, folder / "adapter")
    return {"losses": losses, "labels": labels(model), "restored": _saves_and_restores(accelerator, model, folder)}


def _saves_and_restores(accelerator: Accelerator, model: nn.Module, folder: Path) -> list[bool]:
    """Save a checkpoint, spoil factors and labels, load it, see if all is as it was, by the logits too; then the
    Trainer's kind, which holds the adapter alone."""
    plugin = accelerator.state.fsdp_plugin
    accelerator.save_state(str(folder / "checkpoint"))
    save_fsdp_model(plugin, accelerator, model, str(folder / "adapter_only"), adapter_only=True)
    trained = {name: p.to_local().clone() for name, p in model.named_parameters() if p.requires_grad}
    kept, said = labels(model), logits(model)

    def is_restored() -> bool:
        now = dict(model.named_parameters())
        same = all(torch.equal(now[name].to_local(), saved) for name, saved in trained.items())
        return torch.equal(logits(model), said) and same and labels(model) == kept

    spoil(model)
    spoiled = not is_restored()
    accelerator.load_state(str(folder / "checkpoint"))
    restored = is_restored()
    spoil(model)
    load_fsdp_model(plugin, accelerator, model, str(folder / "adapter_only"), adapter_only=True)
    return [spoiled, restored, is_restored()]


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    """Zero the factors and swap the labels of two blocks."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.zero_()
    for layer in layers(model).values():
        rows, cols, scale = layer.partition_of("default")
        layer.set_partition("default", (1 - rows, cols, scale))


def fsdp2_full(folder: Path) -> Result:
    return fsdp2(folder, checkpoints_activations=True)


def fsdp2_sharded(folder: Path) -> Result:
    return fsdp2(folder, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=True)


def fsdp2_documented(folder: Path) -> Result:
    """By the file in docs/performance.md, whose keys accelerate's launcher hands to the plugin in the environment."""
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text(encoding="utf-8")
    config = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["fsdp_config"]
    os.environ.update({key.upper(): str(value) for key, value in config.items()})
    accelerator = fresh_accelerator(fsdp_plugin=FullyShardedDataParallelPlugin())
    model, _, losses = train(accelerator, adapted())
    save_adapter(accelerator, model, folder / "adapter")
    return {"losses": losses, "labels": labels(model), "fsdp2": accelerator.is_fsdp2, "merge": _merges(model)}


@torch.no_grad()
def _merges(model: Any) -> list[float]:
    """How far the logits of the merged and of the unmerged model are from those before."""
    ids = micro_batches()[0]
    before, distances = model.eval()(input_ids=ids).logits, []
    with merged(model, lossy=True):
        distances.append(float((model(input_ids=ids).logits - before).abs().max()))
    return [*distances, float((model(input_ids=ids).logits - before).abs().max())]


def fsdp2_experts(folder: Path) -> Result:
    accelerator = fresh_accelerator(fsdp_plugin=plugin(2, transformer_cls_names_to_wrap=["Qwen3MoeDecoderLayer"]))
    model, _, losses = train(accelerator, with_experts())
    save_adapter(accelerator, model, folder / "adapter")
    return {"losses": losses, "labels": labels(model), "restored": _saves_and_restores(accelerator, model, folder)}


def fsdp2_embedding_and_convolution(folder: Path) -> Result:
    accelerator = fresh_accelerator(fsdp_plugin=plugin(2, transformer_cls_names_to_wrap=["ReaderBlock"]))
    model, _, losses = train(accelerator, with_embedding_and_convolution())
    save_adapter(accelerator, model, folder / "adapter")
    return {"losses": losses, "labels": labels(model), "restored": _saves_and_restores(accelerator, model, folder)}


def fsdp1(folder: Path, precision: str = "no", **options: Any) -> Result:
    """Its whole state dict is not asked for: on a CPU it fails inside PyTorch, with flat parameters for LoRA too."""
    chosen = plugin(1, sync_module_states=False, **options)
    accelerator = fresh_accelerator(fsdp_plugin=chosen, mixed_precision=precision)
    model = adapted()
    exact = [layer.smoa_block_scale["default"].clone() for layer in layers(model).values()]
    chosen.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    model, _, losses = train(accelerator, model)
    found: Result = {"losses": losses, "labels": labels(model)}
    if precision != "no":  # then FSDP1 rounds the buffers in place
        trained = layers(model).values()
        saved = [layer.state_dict()["smoa_block_scale.default"] for layer in trained]
        found["rounded"] = [
            not torch.equal(layer.smoa_block_scale["default"].float(), scale)
            for layer, scale in zip(trained, exact, strict=True)
        ]
        found["exact"] = list(map(torch.equal, saved, exact))
    return found


def fsdp1_flat(folder: Path) -> Result:
    """One flat parameter for each unit: factors exist only while their own unit is computed."""
    return fsdp1(folder, use_orig_params=False)


def fsdp1_original(folder: Path) -> Result:
    return fsdp1(folder, use_orig_params=True, activation_checkpointing=True)


def fsdp1_bfloat16(folder: Path) -> Result:
    return fsdp1(folder, precision="bf16", use_orig_params=True)


SCENARIOS: list[Callable[[Path], Result]] = [
    late_process_group,
    ddp,
    disagreeing_weights,
    fsdp2_full,
    fsdp2_sharded,
    fsdp2_documented,
    fsdp2_experts,
    fsdp2_embedding_and_convolution,
    fsdp1_flat,
    fsdp1_original,
    fsdp1_bfloat16,
]


def run_scenarios(folder: Path, scenarios: Sequence[Callable[[Path], Result]]) -> None:
    """Run one after the other; what this rank found, or how it failed, goes into the folder."""
    torch.set_num_threads(1)
    results: dict[str, Result] = {}
    for scenario in scenarios:
        name = scenario.__name__
        try:
            results[name] = scenario(folder / name)
        except Exception:
            results[name] = {"failure": traceback.format_exc()}
    (folder / f"rank{RANK}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]), SCENARIOS)
