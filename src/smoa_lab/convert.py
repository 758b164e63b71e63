"""Approximates a SMoA adapter, or a run's, by a LoRA, and measures what that loses of ΔW and of the task.

The best LoRA of rank k keeps the k largest singular values of ΔW (Eckart and Young, 1936). PEFT's `convert_to_lora`
computes it. Each layer is converted by itself, so that a rank beyond its smaller side is that side.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from smoa.errors import ConfigError, SmoaError, UnsupportedModuleError, UnsupportedVersionError, first_of
from smoa.files.names import PREFIX, adapter_layers
from smoa_lab.base_models import RunModel, packaged_name
from smoa_lab.basics.folders import check_place, new_folder
from smoa_lab.merge import copy_tokenizer, store_share
from smoa_lab.open_run import (
    adapter_config,
    adapter_of_run,
    model_of,
    open_run,
    with_saved_adapter,
)
from smoa_lab.scoring.evaluation import Evaluation
from smoa_lab.scoring.losses import Losses
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.verify import verify


def convert_run(
    place: str | Path, output: str | Path, rank: int | float, base: str | None = None, score: bool = True
) -> dict[str, Any]:
    """Write a LoRA to the new folder ``output``, load it from there, and say what it loses of the adapter.

    ``loss``, if ``place`` is a run's folder, has the mean negative log-likelihood, in nats, of a token over the run's
    held-out rows: of the base, the adapter and the LoRA; what the conversion adds, row by row, with its standard error;
    and the share of the adapter's gain over the base that is kept, None without a gain. ``options`` are those with
    which the run loads its base: PEFT's files have no place for them.

    ``rank`` is that of every layer, or of its smaller side if that is less; or, as a float in (0, 1], the share of
    ‖ΔW‖² that each layer keeps at the least rank that does.
    """
    check_place(Path(output), is_new=True)
    if not hasattr(peft, "convert_to_lora"):
        raise UnsupportedVersionError(f"PEFT {peft.__version__} has no convert_to_lora; install peft 0.19 or later")
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ConfigError(f"--rank is a positive integer, and --energy a share of ‖ΔW‖² in (0, 1], got {rank}")
    source = adapter_of_run(place)
    kind = getattr(adapter_config(source).peft_type, "value", None)
    if kind != "SMOA":
        raise ConfigError(f"{source}: is an adapter of the type {kind}; only SMoA's are converted to LoRA")
    folder = RunFolder(Path(place))
    config = open_run(place, base=base)[0] if score and folder.finished else None
    held_out: Evaluation | None = None
    losses: list[Losses] = []
    if config is not None:
        run = load_run(config, trains=False)
        held_out, _ = run.evaluation(answers=False, folder=folder)
        if held_out.rows:
            losses.append(held_out.measure_once(run.base).losses)
            losses.append(held_out.measure_once(with_saved_adapter(run.base, source)).losses)
        del run
    with new_folder(Path(output)) as written:
        options = {key: own for key, own in model_of(source, base).section.options.items() if key != "revision"}
        report = {"folder": str(output), "loss": None, "options": options, **_save_lora(source, rank, written, base)}
        copy_tokenizer(source, written)
        store_share(written, 1 - report["error"] ** 2)  # of ‖ΔW‖²: a truncated decomposition is a projection
        with suppress(SmoaError, IndexError):  # of what is no language model, or has no tokenizer of its own
            share = verify(source, [str(written)], base=base)[-1].share
            store_share(written, 1.0 if share is None else share)
        if config is not None and held_out is not None and losses:
            lora = held_out.measure_once(with_saved_adapter(RunModel.of(config).load(), written)).losses
            report["loss"] = _loss(losses[0], losses[1], lora)
    return report


def _loss(before: Losses, adapter: Losses, lora: Losses) -> dict[str, Any]:
    change = lora.change_from(adapter)
    gained = before.mean - adapter.mean
    return {
        "rows": len(lora.nll),
        "base": before.mean,
        "adapter": adapter.mean,
        "lora": lora.mean,
        "lora_change": change.mean,
        "lora_change_stderr": change.stderr,
        "gain_kept": (before.mean - lora.mean) / gained if gained > 0 else None,
    }


@torch.no_grad()
def _save_lora(source: Path, rank: int | float, folder: Path, base: str | None) -> dict[str, Any]:
    """Write the LoRA's files, from ΔW in the weights that :func:`verify` compares too; its largest rank, both numbers
    of parameters, and the error of ΔW, by layer and in all."""
    model = with_saved_adapter(model_of(source, base).load(), source)
    own = sum(parameter.numel() for name, parameter in model.named_parameters() if ".smoa_" in name)
    layers = adapter_layers(model.base_model.model, "default")
    others = [name for name, layer in layers.items() if not layer.supports_lora_conversion("default")]
    if others:
        raise UnsupportedModuleError(f"{first_of(others)}: PEFT converts linear layers only; merge it instead")
    # Trained tensors that are not factors: biases, modules_to_save, token embeddings
    saved: dict[str, Tensor] = get_peft_model_state_dict(model)
    state = {name: tensor for name, tensor in saved.items() if ".smoa_" not in name}
    ranks, found, parameters, update, error = dict[str, int](), list[dict[str, Any]](), 0, 0.0, 0.0
    for name, layer in layers.items():
        delta = layer.delta("default").float()
        _, factors = peft.convert_to_lora(layer, min(rank, *delta.shape) if isinstance(rank, int) else rank)
        A, B = (factors[f".lora_{part}.weight"] for part in "AB")
        state |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        of_layer, lost = (float(torch.linalg.vector_norm(part)) ** 2 for part in (delta, delta - B @ A))
        ranks[name] = len(A)
        found.append({"module": name, "rank": len(A), "error": (lost / of_layer) ** 0.5 if of_layer else 0.0})
        parameters, update, error = parameters + A.numel() + B.numel(), update + of_layer, error + lost
    config, largest = model.peft_config["default"], max(ranks.values())
    exceptions = {name: own for name, own in ranks.items() if own != largest}
    name = base or str(config.base_model_name_or_path)
    lora = LoraConfig(
        r=largest,  # and alpha, in every layer: the factors include the scale
        lora_alpha=largest,
        rank_pattern=exceptions,
        alpha_pattern=dict(exceptions),
        target_modules=list(ranks),
        bias="lora_only" if config.bias == "smoa_only" else config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=packaged_name(name) or name,  # and not the cache folder, which no other machine has
        revision=config.revision if name == config.base_model_name_or_path else None,
        inference_mode=True,
    )
    lora.save_pretrained(str(folder))
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, folder / SAFETENSORS_WEIGHTS_NAME)
    total = (error / update) ** 0.5 if update else 0.0
    sizes = {"adapter_parameters": own, "parameters": parameters}
    return {"rank": largest, "error": total, **sizes, "layers": found}
