"""Measures what adapters cost at the shapes of Llama 3.2 1B and 3B and Llama 3 8B, with random weights.

    python benchmarks/size.py 1b                                # 1b, 3b or 8b
    python benchmarks/size.py 8b --layers 1 --parts making      # what takes too long for all layers

Parts: `making` an adapter, in a process for each method, and for spectral blocks in a second one; `memory` of steps,
files, merges and tokens, likewise; their `times`, in turn in one process; the same in `4bit`, on a CPU without HiRA,
where it takes more than half an hour. All methods train as many parameters as LoRA r = 8 on q, k, v, up and down. The
base is in bfloat16 if the machine has instructions for it. The blocks of K = 4 are random, except in `making`.

Rows go to benchmarks/results/size_<device>.json, from which benchmarks/report.py makes tables. A second call goes on
with the rows that are missing; Ctrl-C keeps those that are done, and none starts after `--minutes`. `--tiny` runs
everything with small sizes and writes nothing. Needs `pip install '.[lab]'`, and bitsandbytes for `4bit`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _common import Step, cost, free_memory, in_own_process, interleaved, lower_quartile, pick_device, trainable
from gpu import LLAMA_3_8B, TINY_LLAMA, Rows, adapted_llama, llama
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from smoa.scores import CACHE_VARIABLE
from smoa_lab.config.run import cpu_multiplies_bfloat16

LLAMA_3_2 = {"intermediate_size": 8192, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
SIZES = {
    "1b": LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, **LLAMA_3_2),
    "3b": LlamaConfig(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, **LLAMA_3_2),
    "8b": LLAMA_3_8B,
}
METHODS = {
    "frozen": ("", 0, ""),
    "lora": ("lora", 0, ""),
    "smoa-4": ("smoa", 4, "spectral"),
    "smoa-8": ("smoa", 8, "contiguous"),
    "hira": ("hira", 0, ""),
}
PARTS = ("making", "memory", "times", "4bit")
PHASES = ("step", "checkpointed", "save", "load", "merge", "undo", "token")
OF_FROZEN = ("step", "checkpointed", "token")
TOKENS, GENERATED, REPEATS, PHASE_SECONDS = 256, 8, 6, 60
"""A phase is repeated as often as the seconds allow, twice to six times."""
PROGRAM_BYTES = 1_000_000_000
"""What Python, torch and transformers take, and the adapters."""
DECOMPOSED, LOGITS, HIDDEN = 10, 5, 40
"""Copies of the largest matrix in float32 while it is decomposed, LAPACK's included, of the logits of a step, and
hidden states that a layer keeps for the backward: upper bounds, since what is needed must not turn out larger."""


class Model:
    """The base of a command: its config, with as many layers as are asked for or fit, its dtype and its device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = pick_device(options.device)
        native = self.device.type == "cuda" or cpu_multiplies_bfloat16()
        self.dtype = torch.bfloat16 if native else torch.float32
        self.config = copy.deepcopy(TINY_LLAMA if options.tiny else SIZES[options.size])
        all_layers, layers = self.config.num_hidden_layers, options.layers
        one, none = (self.weight_bytes(layers) for layers in (1, 0))
        held = int((options.gigabytes * 1e9 - none) // (one - none))
        self.config.num_hidden_layers = layers or max(1, min(all_layers, held))

    def weight_bytes(self, layers: int) -> int:
        with torch.device("meta"):
            config = copy.deepcopy(self.config)
            config.num_hidden_layers = layers
            model = AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters()) * self.dtype.itemsize

    def needed(self, layers: int) -> int:
        """Upper bound of the bytes that making an adapter and a step take, HiRA's step excepted."""
        config, size = self.config, self.dtype.itemsize
        making = 4 * DECOMPOSED * config.hidden_size * max(config.intermediate_size, config.hidden_size)
        step = LOGITS * TOKENS * config.vocab_size * 4 + HIDDEN * layers * TOKENS * config.hidden_size * size
        return PROGRAM_BYTES + self.weight_bytes(layers) + max(making, step)

    @cache  # noqa: B019  (one object a process)
    def base(self, bits: int = 16) -> Any:
        torch.manual_seed(0)
        if bits == 4:
            return llama(self.config, self.device, quantized=True)
        with self.device:
            return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).requires_grad_(False)

    def copy_of(self, bits: int = 16) -> Any:
        """The base with modules of its own, and the base's parameters."""
        base = self.base(bits)
        return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})

    def adapted(self, method: str, bits: int = 16, partition: str | None = None) -> Any:
        kind, num_blocks, own = METHODS[method]
        model = self.copy_of(bits)
        return adapted_llama(model, kind, num_blocks, partition or own) if kind else model


def too_little(model: Model, options: argparse.Namespace) -> str:
    """What to say if the memory that is free doesn't suffice; empty if it does."""
    layers, free = model.config.num_hidden_layers, free_memory(model.device)
    if (needed := model.needed(layers)) <= free:
        return ""
    fits = [f"--layers {n}" for n in range(layers - 1, 0, -1) if model.needed(n) <= free][:1]
    for size in [] if options.tiny else reversed(list(SIZES)[: list(SIZES).index(options.size)]):
        smaller = Model(argparse.Namespace(**{**vars(options), "size": size, "layers": None}))
        fits += [size] if smaller.needed(smaller.config.num_hidden_layers) <= free else []
    told = f"{options.size} with {layers} layers needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    return f"{told}; {' or '.join(fits)} would fit" if fits else f"{told}; no smaller size fits either"


def phases(model: Model, adapted: Any, method: str, folder: Path, bits: int = 16) -> dict[str, Step]:
    """What is done with a model, by phase. A step trains: the gradient of its input, and AdamW's update."""
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS), device=model.device)
    fresh = [] if method == "frozen" else [model.copy_of(bits) for _ in range(REPEATS + 1)]
    settings = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}

    def step(checkpointed: bool) -> None:
        adapted.train()
        if checkpointed:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            adapted.gradient_checkpointing_disable()
        inputs = adapted.get_input_embeddings()(tokens).detach().requires_grad_(True)
        adapted(inputs_embeds=inputs, labels=tokens, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    def generate() -> None:
        adapted.gradient_checkpointing_disable()
        adapted.eval().generate(input_ids=tokens[:, :16], **settings)

    done: dict[str, Step] = {
        "step": partial(step, False),
        "checkpointed": partial(step, True),
        "save": lambda: adapted.save_pretrained(folder, save_embedding_layers=False),
        "load": lambda: PeftModel.from_pretrained(fresh.pop(), folder),
        "merge": lambda: adapted.merge_adapter(),
        "undo": lambda: adapted.unmerge_adapter(),
        "token": generate,
    }
    return {name: done[name] for name in (OF_FROZEN if method == "frozen" else PHASES)}


def alone(model: Model, part: str, method: str) -> dict[str, Any]:
    """The figures of a method in this process."""
    if part == "making":
        sizes, eigh, kept = list[int](), torch.linalg.eigh, [model.base(16)]

        def counted(matrix: torch.Tensor, **options: str) -> Any:
            sizes.append(len(matrix))
            return eigh(matrix, **options)

        with mock.patch.object(torch.linalg, "eigh", counted):
            figures: dict[str, Any] = cost(lambda: kept.append(model.adapted(method)), model.device)
        return figures | {"decompositions": sum(size > 2 for size in sizes), "trainable": trainable(kept[-1])}
    bits = 4 if part == "4bit" else 16
    adapted = model.adapted(method, bits, "random" if method == "smoa-4" else None)
    with tempfile.TemporaryDirectory() as folder:
        done = phases(model, adapted, method, Path(folder), bits)
        figures = {name: cost(step, model.device) for name, step in done.items()}
        figures["file_bytes"] = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return figures | {"base_bytes": sum(parameter.nbytes for parameter in model.base(bits).parameters())}


def made_twice(part: str, method: str) -> dict[str, Any]:
    """What one process says, and for making spectral blocks another that finds the first one's scores."""
    with tempfile.TemporaryDirectory() as scores, mock.patch.dict(os.environ, {CACHE_VARIABLE: scores}):
        figures = in_own_process(f"{part} {method}")
        second = in_own_process(f"{part} {method}") if (part, method) == ("making", "smoa-4") else None
    return figures | ({"second": second} if second else {})


def in_turn(phase: str, done: Callable[[], dict[str, dict[str, Step]]], device: torch.device) -> dict[str, Any]:
    """Seconds of a phase by method, in turn; a merge and its undo are timed together, so that each finds the other."""
    names = (phase, "undo") if phase == "merge" else (phase,)
    steps = {f"{method} {name}": of[name] for method, of in done().items() for name in names if name in of}
    once = sum(taken[0] for taken in interleaved(steps, 1, device).values())
    times = interleaved(steps, max(2, min(REPEATS, int(PHASE_SECONDS / once))), device)
    return {"seconds": {name: lower_quartile(taken) for name, taken in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, help="by default all, or as many as --gigabytes of weights hold")
    parser.add_argument("--gigabytes", type=float, default=14)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="a part and a method, to measure in this process and print as JSON")
    options = parser.parse_args()
    model = Model(options)
    if options.only:
        print(json.dumps(alone(model, *options.only.split())))
        return
    if told := too_little(model, options):
        parser.error(told)
    if model.device.type == "cpu":  # what needs more is a row with an error, and no other process is killed for it
        resource.setrlimit(resource.RLIMIT_DATA, (free_memory(model.device), resource.RLIM_INFINITY))
    rows = Rows(f"size_{model.device.type}", model.device, options.minutes, options.tiny)
    named = {"size": options.size, "layers": model.config.num_hidden_layers, "dtype": str(model.dtype)[6:]}
    try:
        for part in options.parts:
            measure(rows, model, part, options, named)
    except KeyboardInterrupt:
        parser.exit(130, f"stopped; {len(rows.rows)} rows are kept, and the same command goes on\n")


def measure(rows: Rows, model: Model, part: str, options: argparse.Namespace, named: dict[str, Any]) -> None:
    """The rows of a part."""
    case = named | {"part": part, "threads": torch.get_num_threads()}
    if part != "times":
        left_out = {"making": "frozen", "4bit": "hira" if model.device.type == "cpu" else ""}.get(part)
        for method in (name for name in options.methods if name != left_out):
            rows.measure(partial(made_twice, part, method), **case, method=method)
        return

    with tempfile.TemporaryDirectory() as folder:

        @cache
        def done() -> dict[str, dict[str, Step]]:
            models = {method: model.adapted(method, partition="random") for method in options.methods}
            for method in {*models} - {"frozen"}:
                models[method].save_pretrained(Path(folder, method), save_embedding_layers=False)  # for `load`
            return {method: phases(model, one, method, Path(folder, method)) for method, one in models.items()}

        for phase in PHASES:
            if phase != "undo":
                rows.measure(partial(in_turn, phase, done, model.device), **case, phase=phase)


if __name__ == "__main__":
    main()
