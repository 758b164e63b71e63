"""Measures whole models, each of Gemma 3 270M (needs `pip install '.[lab,demo]'`).

    python benchmarks/models.py model_step
    python benchmarks/models.py decoding
    python benchmarks/models.py mixed_batch
    python benchmarks/models.py quantized_memory [--base nf4]
    python benchmarks/models.py quantized_merge

SMoA's partition is random, because decomposing the weights would not change a cost. LoRA has as many trainable
parameters. Times are taken in turn in one process, memory in a process of its own for each method.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from _common import (
    drawn,
    in_own_process,
    interleaved,
    lower_quartile,
    peak,
    reset_peak,
    run,
    saved_bytes,
    seconds,
    step_memory,
    trainable,
)
from peft import get_peft_model
from torch import Tensor, nn

from smoa.generation import keeping
from smoa.quantized import QuantizedLinear
from smoa_lab.base_models import load_weights
from smoa_lab.config.run import ModelSection

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
STEP_BARS = {"time": 1.15, "memory": 1.03}
DECODING_BARS = {"merged": 1.00}
BOTH = ("smoa", "lora")
MERGED_BLOCKS = (0, 8, 17)
RELATIVE_SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""rms of ΔW / W on SMoA's blocks."""


def gemma(method: str, r: int, num_blocks: int, device: torch.device, base: str = "float32") -> Any:
    """The base model in "float32" or one of QUANTIZATIONS: as it is for "base", else with "smoa" or "lora", which start
    non-zero."""
    torch.manual_seed(0)
    options = {"quantization_config": QUANTIZATIONS[base]} if base in QUANTIZATIONS else {}
    model = load_weights(ModelSection(name="gemma3-270m", options=options))
    model.to(device)
    if method == "base":
        return model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, drawn(method, r // num_blocks, num_blocks))


def training_step(model: Any, batch: int, tokens: int, answer: int, device: torch.device) -> Callable[[], None]:
    """Forward, loss on the last tokens of random examples, backward, and AdamW's update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs = torch.randint(10, 200_000, (batch, tokens), device=device)
    model.train()

    def step() -> None:
        logits = model(input_ids=inputs, logits_to_keep=answer + 1).logits[:, :-1].float()
        nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, -answer:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def model_step(
    device: torch.device,
    batch: int = 16,
    tokens: int = 64,
    answer: int = 16,
    r: int = 32,
    num_blocks: int = 4,
    repeats: int = 12,
    only: str | None = None,
) -> dict[str, Any]:
    """A training step with SMoA and with PEFT's LoRA, in float32."""
    if only is not None:
        step = training_step(gemma(only, r, num_blocks, device), batch, tokens, answer, device)
        reset_peak(device)
        for _ in range(4):
            step()
        print(json.dumps(peak(device)))
        return {"name": None}
    models = {method: gemma(method, r, num_blocks, device) for method in BOTH}
    steps = {method: training_step(model, batch, tokens, answer, device) for method, model in models.items()}
    counts = {method: trainable(model) for method, model in models.items()}
    interleaved(steps, 1, device)
    times = interleaved(steps, repeats, device)
    del models, steps
    memory = {method: in_own_process(method) for method in BOTH}
    result = {
        "bars": STEP_BARS,
        "trainable": counts,
        "seconds": times,
        "ratio": lower_quartile(times["smoa"]) / lower_quartile(times["lora"]),
        "ratio_of_fastest": min(times["smoa"]) / min(times["lora"]),
        "peak_bytes": memory,
        "memory_ratio": memory["smoa"] / memory["lora"],
    }
    print({key: value for key, value in result.items() if key != "seconds"})
    return result


class Decoder:
    """Decodes greedily with the key-value cache; `keeping` makes the context of each call."""

    def __init__(self, model: Any, prompt: Tensor, tokens: int, keeping: Callable[[nn.Module], Any]) -> None:
        self.model, self.prompt, self.tokens, self.keeping = model.eval(), prompt, tokens, keeping

    @torch.inference_mode()
    def __call__(self) -> tuple[float, float]:
        """Seconds of prefill and of decoding. Afterwards `text` is the tokens, and `kept` the bytes kept."""
        self.past, self.answer, device = None, [self.prompt], self.prompt.device
        with self.keeping(self.model) as snapshot:
            prefill = seconds(self.step, device)
            decode = seconds(lambda: [self.step() for _ in range(self.tokens - 1)], device)
            kept = () if snapshot is None else (deltas for _, deltas in snapshot.kept.values())
            self.kept = sum(part.nbytes for deltas in kept for _, part in deltas)
        self.text = torch.cat(self.answer, 1)
        return prefill, decode

    def step(self) -> None:
        outputs = self.model(input_ids=self.answer[-1], past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = outputs.past_key_values
        self.answer.append(outputs.logits[:, -1].argmax(-1, keepdim=True))


def decoding(
    device: torch.device, tokens: int = 24, prompt: int = 16, r: int = 32, num_blocks: int = 4, repeats: int = 5
) -> dict[str, Any]:
    """What an unmerged adapter costs in token-by-token decoding of one sequence, in float32.

    Routes: the base model, SMoA merged, SMoA unmerged as `generate` does by default (the blocks of ΔW kept for each
    call) and with nothing kept, and LoRA unmerged. Prefill (the prompt and the first token) and decoding are timed
    apart; the cache is filled in the prefill.
    """
    given = torch.randint(10, 200_000, (1, prompt), device=device)
    methods = {"base": "base", **dict.fromkeys(("merged", "default", "unmerged"), "smoa"), "lora": "lora"}
    models = {route: gemma(method, r, num_blocks, device) for route, method in methods.items()}
    models["merged"].merge_adapter()
    decoders = {
        route: Decoder(model, given, tokens, keeping if route == "default" else lambda _: nullcontext())
        for route, model in models.items()
    }
    for decode in decoders.values():
        decode()
    same = (decoders["default"].text == decoders["unmerged"].text).float().mean().item()
    phases: dict[str, list[tuple[float, float]]] = {route: [] for route in decoders}
    for _ in range(repeats):
        for route, decode in decoders.items():
            phases[route].append(decode())
    times = {route: [sum(pair) for pair in pairs] for route, pairs in phases.items()}
    quickest = {route: lower_quartile(of_route) for route, of_route in times.items()}
    of_phase = {
        phase: {route: lower_quartile([pair[place] for pair in pairs]) for route, pairs in phases.items()}
        for place, phase in enumerate(("prefill", "decode"))
    }
    result = {
        "bars": DECODING_BARS,
        "seconds": times,
        "phase_seconds": phases,
        "tokens_per_second": {route: tokens / time for route, time in quickest.items()},
        "ratio": {route: time / quickest["base"] for route, time in quickest.items()},
        "ratio_of_fastest": {route: min(of_route) / min(times["base"]) for route, of_route in times.items()},
        "phase_ratio": {
            phase: {route: time / ways["base"] for route, time in ways.items()} for phase, ways in of_phase.items()
        },
        "same_tokens_with_and_without_cache": same,
        "default_cache_bytes": decoders["default"].kept,
        "model_bytes": sum(parameter.nbytes for parameter in models["base"].parameters()),
    }
    print({key: value for key, value in result.items() if "seconds" not in key})
    return result


@torch.inference_mode()
def mixed_batch(
    device: torch.device,
    adapters: int = 3,
    each: int = 2,
    prompt: int = 32,
    r: int = 32,
    num_blocks: int = 4,
    repeats: int = 5,
) -> dict[str, Any]:
    """One batch for several adapters (`adapter_names`) against running the adapters in turn, in float32.

    Samples are split evenly over the adapters and the base model. `mixed` is one forward with `adapter_names`;
    `in_turn` a forward for each adapter on its own samples, switching included; `one` runs the whole batch with one
    adapter, and `base` with none. Each is timed for a prompt and for a single token, as in decoding.
    """
    model: Any = gemma("smoa", r, num_blocks, device).eval()
    for number in range(1, adapters):
        model.add_adapter(f"adapter {number}", drawn("smoa", r // num_blocks, num_blocks))
    model.eval()
    names = [*model.peft_config, "__base__"]

    def forward(batch: Tensor, **options: Any) -> Tensor:
        logits: Tensor = model(input_ids=batch, logits_to_keep=1, use_cache=False, **options).logits[:, -1]
        return logits

    def under(name: str, batch: Tensor) -> Tensor:
        if name == "__base__":
            with model.disable_adapter():
                return forward(batch)
        if name not in model.active_adapters:
            model.set_adapter(name)
        return forward(batch)

    by_tokens = {}
    for length in (prompt, 1):
        tokens = torch.randint(10, 200_000, (len(names) * each, length), device=device)
        parts, per_sample = tokens.split(each), [name for name in names for _ in range(each)]
        routes: dict[str, Callable[[], Tensor]] = {
            "mixed": lambda tokens=tokens, names=per_sample: forward(tokens, adapter_names=names),
            "in_turn": lambda parts=parts: torch.cat([under(*pair) for pair in zip(names, parts, strict=True)]),
            "one": lambda tokens=tokens: under(names[0], tokens),
            "base": lambda tokens=tokens: under("__base__", tokens),
        }
        alone = routes["in_turn"]()
        difference = (routes["mixed"]() - alone).abs().max() / alone.abs().max()
        interleaved(routes, 1, device)
        times = interleaved(routes, repeats, device)
        quickest = {route: lower_quartile(of_route) for route, of_route in times.items()}
        ratio = {route: time / quickest["in_turn"] for route, time in quickest.items()}
        print(f"{len(tokens)} x {length} tokens:", ratio)
        measured = {"seconds": times, "ratio_to_in_turn": ratio, "largest_relative_difference": float(difference)}
        by_tokens[str(length)] = measured
    return {"by_tokens": by_tokens}


def quantized_memory(
    device: torch.device,
    base: str = "nf4",
    batch: int = 4,
    tokens: int = 64,
    answer: int = 16,
    r: int = 32,
    num_blocks: int = 4,
    steps: int = 2,
    repeats: int = 1,
    only: str | None = None,
) -> dict[str, Any]:
    """The memory of a training step on a quantized model, with SMoA and with LoRA.

    Reported are the most that torch allocates at once, weights included; peak resident memory, which on a CPU also
    counts the mapped file; the bytes saved for the backward of a step; and seconds per step.
    """
    if only is not None:
        model = gemma(only, r, num_blocks, device, base)
        step = training_step(model, batch, tokens, answer, device)
        tensors = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
        weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())  # tied ones count once
        saved = saved_bytes(model, step)
        allocated = weights + step_memory(step)[1] if device.type == "cpu" else None
        reset_peak(device)
        times = [seconds(step, device) for _ in range(steps)]
        memory = {"allocated_bytes": allocated or peak(device), "resident_bytes": peak(device), "saved_bytes": saved}
        print(json.dumps({**memory, "seconds": times, "weight_bytes": weights, "trainable": trainable(model)}))
        return {"name": None}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in BOTH}
    for _ in range(repeats):
        for method in BOTH:
            runs[method].append(in_own_process(method))
    peaks = {method: statistics.median(each["allocated_bytes"] for each in of_all) for method, of_all in runs.items()}
    print(peaks, peaks["smoa"] / peaks["lora"])
    ratio = peaks["smoa"] / peaks["lora"]
    return {"name": f"quantized_memory_{base}", "runs": runs, "allocated_bytes": peaks, "ratio": ratio}


@torch.no_grad()
def quantized_merge(device: torch.device, r: int = 32, num_blocks: int = 4) -> dict[str, Any]:
    """How much of ΔW is lost by merging into quantized weights, by ΔW's relative size.

    The loss is ‖merged weight − W − ΔW‖ / ‖ΔW‖ over the layers of three decoder blocks, in 4 and in 8 bits.
    """
    errors: dict[str, dict[str, float]] = {}
    for base in QUANTIZATIONS:
        model = gemma("smoa", r, num_blocks, device, base)
        blocks = [model.base_model.model.model.layers[index] for index in MERGED_BLOCKS]
        layers = [module for block in blocks for module in block.modules() if isinstance(module, QuantizedLinear)]
        of_unit_size = []
        for layer in layers:
            delta = layer.delta("default")
            changed = delta != 0
            size = (delta[changed] / layer.base_weight()[changed]).square().mean().sqrt()
            of_unit_size.append(layer.smoa_B["default"].weight / size)
        errors[base] = {}
        for size in RELATIVE_SIZES:
            error = update = 0.0
            for layer, factors in zip(layers, of_unit_size, strict=True):
                layer.smoa_B["default"].weight.copy_(factors * size)
                before, delta = layer.base_weight(), layer.delta("default")
                layer.merge()
                error += float((layer.base_weight() - before - delta).square().sum())
                update += float(delta.square().sum())
                layer.unmerge()
            errors[base][f"{size:g}"] = (error / update) ** 0.5
    print(errors)
    return {"blocks": MERGED_BLOCKS, "quantizations": QUANTIZATIONS, "relative_error": errors}


if __name__ == "__main__":
    run(
        __doc__,
        model_step=model_step,
        decoding=decoding,
        mixed_batch=mixed_batch,
        quantized_memory=quantized_memory,
        quantized_merge=quantized_merge,
    )
