"""Measures SMoA on a GPU, in parts of at most eight minutes.

    python benchmarks/gpu.py layer        # one layer's training step: time, launches and memory of each method
    python benchmarks/gpu.py model        # a training step of a Llama-3-8B-shaped model with random weights
    python benchmarks/gpu.py quantized    # the same on a 4-bit base
    python benchmarks/gpu.py decoding     # tokens a second: base, merged, in `generate`, LoRA
    python benchmarks/gpu.py fleet        # batches with 1 and 32 adapters: time and launches, LoRA beside them
    python benchmarks/gpu.py serve        # vLLM, eager and with CUDA graphs: a decoding step and prompts of 32 adapters
    python benchmarks/gpu.py injection    # decomposing the weights, and whether the labels are the CPU's

A part that is called again goes on with the rows that are missing. Each writes benchmarks/results/gpu_<part>.json, from
which benchmarks/report.py makes tables. `--tiny` runs everything once with small sizes, on a CPU too, and writes
nothing. Needs `pip install '.[lab]'`, bitsandbytes for `quantized`, and vLLM for `serve`, which counts the tokens that
engines with and without graphs agree on, and whose ranks are those of `--ranks`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from _common import (
    RESULTS,
    drawn,
    interleaved,
    lower_quartile,
    peak,
    pick_device,
    provenance,
    reset_peak,
    synchronize,
    write_results,
)
from layers import OneLayer, adapted, inputs, training_step
from peft import get_peft_model, prepare_model_for_kbit_training
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from smoa.generation import keeping
from smoa.kernels import one_product
from smoa.partition import Blocks
from smoa.scores import clear_spectrum_cache
from smoa.spectrum import make_partition

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (2048, 640))
TOKENS = (512, 4096, 1, 16384)
NUM_BLOCKS = (2, 4, 8)
OTHERS = ("frozen", "lora", "dora", "hira", "released")
CASE = ("shape", "tokens", "method", "num_blocks", "partition")
"""What stands for a case of which both routes are timed."""
OURS = tuple(product(("eager", "one product", "compiled"), ("random", "contiguous")))
MODELS = (("lora", 0, ""), ("hira", 0, ""), *(("smoa", k, p) for k in (8, 2) for p in ("random", "contiguous")))
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
TINY_LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
)


def free_device() -> None:
    """Give back what this process no longer needs of a GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without one


class Rows:
    """The rows of `benchmarks/results/<name>.json`, measured once each and written at once.

    Rows of another device are dropped. After `minutes` nothing more is measured. A `tiny` run is dry: nothing is read
    or written.
    """

    def __init__(self, name: str, device: torch.device, minutes: float, tiny: bool) -> None:
        self.name, self.device, self.tiny = name, device, tiny
        self.until = time.monotonic() + 60 * minutes
        self.origin = provenance(device)
        path = RESULTS / f"{self.name}.json"
        stored = json.loads(path.read_text()) if path.exists() and not tiny else {"rows": []}
        same = stored["rows"] and stored["provenance"]["device"] == self.origin["device"]
        self.rows: list[dict[str, Any]] = stored["rows"] if same else []

    def measure(self, function: Callable[[], dict[str, Any]], **case: Any) -> None:
        """Add the figures of a case that is missing, or the error: an out-of-memory is a result too."""
        if time.monotonic() > self.until or any(case.items() <= row.items() for row in self.rows):
            return
        print(*case.values(), "…", flush=True)
        try:
            figures = function()
        except (RuntimeError, ValueError, ImportError) as error:
            figures = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        self.rows.append(case | figures | {"commit": self.origin["commit"][:7], "date": self.origin["date"][:10]})
        print(self.rows[-1], flush=True)
        free_device()
        if not self.tiny:
            write_results(self.name, {"rows": self.rows, "provenance": self.origin})

    def cost_of(self, step: Callable[[], object], repeats: int) -> dict[str, Any]:
        """Of one call: milliseconds, milliseconds of the device, kernels started, peak bytes on top of what is held."""
        on_gpu = self.device.type == "cuda"
        interleaved({"": step}, 3, self.device)
        held = reset_peak(self.device)
        step()
        synchronize(self.device)
        costs: dict[str, Any] = {"peak_bytes": peak(self.device) - held if on_gpu else None}
        times = [self._event_seconds(step) for _ in range(1 if self.tiny else repeats)]
        costs |= {"ms": 1e3 * lower_quartile(times), "launches": None, "device_ms": None}
        if on_gpu:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                step()
                synchronize(self.device)
            kernels = [each for each in profiled.events() if each.device_type == torch.autograd.DeviceType.CUDA]
            costs |= {"launches": len(kernels), "device_ms": sum(each.device_time for each in kernels) / 1e3}
        return costs

    def _event_seconds(self, step: Callable[[], object]) -> float:
        """Time of one call, by the device's events if it has them."""
        if self.device.type != "cuda":
            return interleaved({"": step}, 1, self.device)[""][0]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1e3


def layer(rows: Rows) -> None:
    """One layer in bfloat16, r = 64 at each K, the others with the parameters of K = 8."""
    shapes, all_tokens = (((64, 96),), (3,)) if rows.tiny else (SHAPES, TOKENS)
    methods = [(method, 8, "", "") for method in OTHERS]
    methods += [("smoa", num_blocks, *way) for num_blocks, way in product(NUM_BLOCKS, OURS)]
    for tokens, shape, (method, num_blocks, route, partition) in product(all_tokens, shapes, methods):
        named = {"shape": f"{shape[0]}x{shape[1]}", "tokens": tokens, "method": method, "num_blocks": num_blocks}
        cost = partial(layer_cost, rows, shape, tokens, method, num_blocks, route, partition)
        rows.measure(cost, **named, route=route, partition=partition)
    times = {tuple(row[key] for key in (*CASE, "route")): row.get("ms") for row in rows.rows}
    for case in dict.fromkeys(case[:-1] for case in times):
        apart, one = times.get((*case, "eager")), times.get((*case, "one product"))
        if apart and one:
            print(*case, f"take {'one product' if one < apart else 'blocks'}: {one:.2f} and {apart:.2f} ms")


def layer_cost(
    rows: Rows, shape: tuple[int, int], tokens: int, method: str, num_blocks: int, route: str, partition: str
) -> dict[str, Any]:
    base = OneLayer(*shape, torch.bfloat16, rows.device)
    model = adapted(method, base, 64, num_blocks, partition or "random")
    one_product.MIN_TOKENS_ON_GPU = 0 if route == "one product" else sys.maxsize
    torch.compiler.reset()
    step = training_step(torch.compile(model) if route == "compiled" else model, *inputs(base, tokens))
    costs = rows.cost_of(step, 20)
    if route in ("eager", "one product") and rows.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")  # raises where the program waits for the GPU
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return costs


def llama(config: LlamaConfig, device: torch.device, quantized: bool = False) -> Any:
    """A model in bfloat16 with random weights, made on its device; its linear layers in 4 bits if asked."""
    if quantized:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        folder = _checkpoint(config.to_json_string(), device).name
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": device})
        return prepare_model_for_kbit_training(loaded)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)


@cache
def _checkpoint(config: str, device: torch.device) -> tempfile.TemporaryDirectory[str]:
    """The model of a config in JSON as a checkpoint, made once and removed at the end of the process."""
    folder = tempfile.TemporaryDirectory()
    llama(LlamaConfig(**json.loads(config)), device).save_pretrained(folder.name)
    return folder


def adapted_llama(model: Any, method: str, num_blocks: int, partition: str) -> Any:
    """The model with a method that trains the parameters of LoRA r = 8."""
    return get_peft_model(model, drawn(method, 8, num_blocks, partition))


def model(rows: Rows, quantized: bool = False) -> None:
    """Training steps with gradient checkpointing and AdamW, five targets, the parameters of LoRA r = 8."""
    for batch, compiled, adapter in product((1, 4), (False, True), MODELS):
        named = dict(zip(("method", "num_blocks", "partition"), adapter, strict=True))
        cost = partial(model_cost, rows, adapter, batch, compiled, quantized)
        rows.measure(cost, **named, batch=batch, compiled=compiled)


def model_cost(
    rows: Rows, adapter: tuple[str, int, str], batch: int, compiled: bool, quantized: bool
) -> dict[str, Any]:
    config, length = (TINY_LLAMA, 16) if rows.tiny else (LLAMA_3_8B, 2048)
    made = adapted_llama(llama(config, rows.device, quantized), *adapter)
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, config.vocab_size, (batch, length), device=rows.device)
    forward = torch.compile(made) if compiled else made

    def step() -> None:
        forward(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    costs = rows.cost_of(step, 5)
    return costs | {"tokens_per_second": 1e3 * tokens.numel() / costs["ms"]}


def decoding(rows: Rows) -> None:
    """Tokens a second of `generate`, one sequence, after a prompt of 64."""
    for way in ("base", "merged", "lora", "smoa-8", "smoa-4", "smoa-2"):
        rows.measure(partial(decode, rows, way), way=way)


def decode(rows: Rows, way: str) -> dict[str, Any]:
    config, length = (TINY_LLAMA, 4) if rows.tiny else (LLAMA_3_8B, 128)
    made = llama(config, rows.device).eval()
    if way != "base":
        method, _, num_blocks = way.replace("merged", "smoa-8").partition("-")
        made = adapted_llama(made, method, int(num_blocks or 0), "random").eval()
    if way == "merged":
        made.merge_adapter()
    prompt = torch.randint(0, config.vocab_size, (1, 64), device=rows.device)
    settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    times = interleaved({"": lambda: made.generate(input_ids=prompt, **settings)}, 2, rows.device)[""]
    return {"tokens_per_second": length / times[-1]}


def fleet(rows: Rows) -> None:
    """A forward of 32 rows with as many adapters, or one, to be compared with that of the base."""
    for tokens, way, adapters in product((1, 16), ("base", "lora", "smoa-8"), (1, 32)):
        if way != "base" or adapters == 1:
            rows.measure(partial(fleet_cost, rows, tokens, way, adapters), tokens=tokens, way=way, adapters=adapters)


def fleet_cost(rows: Rows, tokens: int, way: str, adapters: int) -> dict[str, Any]:
    config, names = TINY_LLAMA if rows.tiny else LLAMA_3_8B, [f"adapter{number}" for number in range(adapters)]
    made = llama(config, rows.device)
    if way != "base":
        own = drawn("lora", 8, 0) if way == "lora" else drawn("smoa", 1, 8)
        made = get_peft_model(made, own, adapter_name=names[0])
        for name in names[1:]:
            made.add_adapter(name, own)
    ids = torch.randint(0, config.vocab_size, (32, tokens), device=rows.device)
    options = {} if way == "base" else {"adapter_names": [names[row % adapters] for row in range(32)]}
    made.eval()
    with torch.no_grad(), keeping(made.get_base_model() if way == "smoa-8" else made):
        return rows.cost_of(lambda: made(input_ids=ids, use_cache=False, **options), 5)


def serve(rows: Rows, ranks: int = 1) -> None:
    """32 adapters in vLLM: LoRA r = 1 and SMoA r = K = 32, eager and with CUDA graphs of the pieces of the model."""
    for way in ("eager", "pieces"):
        rows.measure(partial(serve_cost, rows, way, ranks), way=way, ranks=ranks)
    found = [row["tokens"] for row in rows.rows if row["ranks"] == ranks and "tokens" in row]
    for method in found[0] if len(found) == 2 else ():
        pairs = [pair for own in zip(*(each[method] for each in found), strict=True) for pair in zip(*own, strict=True)]
        differ = sum(own != base for own, base in zip(found[0][method], found[0]["base"], strict=True))
        print(
            method, f"{sum(a == b for a, b in pairs)} of {len(pairs)} tokens are equal; {differ} texts not the base's"
        )


def serve_cost(rows: Rows, way: str, ranks: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    torch.manual_seed(0)  # each way has the same model and adapters
    wide_heads = LlamaConfig(
        **TINY_LLAMA.to_dict() | {"num_attention_heads": 2, "head_dim": 32}
    )  # as vLLM wants on CPUs
    config, count = (wide_heads, 4) if rows.tiny else (LLAMA_3_8B, 32)
    K, length = min(count, 32), 4 if rows.tiny else 64
    methods = {"lora 1": drawn("lora", 1, 0), f"smoa {K}": drawn("smoa", 1, K, "contiguous")}
    figures: dict[str, Any] = {"tokens": {}}
    with tempfile.TemporaryDirectory() as room:
        llama(config, rows.device).save_pretrained(f"{room}/base")
        for name, own in methods.items():
            get_peft_model(llama(config, rows.device), own).save_pretrained(f"{room}/{name}")
        free_device()  # for the engine, a process of its own
        options: dict[str, Any] = {"enforce_eager": True} if way == "eager" or rows.tiny else {}
        engine = LLM(
            f"{room}/base", dtype="float32" if rows.tiny else "bfloat16", skip_tokenizer_init=True,
            enable_lora=True, max_loras=2 * count + 1, max_lora_rank=1, max_model_len=256, tensor_parallel_size=ranks,
            enable_prefix_caching=False, compilation_config={"cudagraph_mode": "PIECEWISE"},
            additional_config={"smoa_examples": [f"{room}/smoa {K}"]}, seed=0, **options,
        )  # fmt: skip
        prompts: Any = [{"prompt_token_ids": list(range(3 + place, 19 + place))} for place in range(count)]
        for first, name in enumerate(["base", *methods]):
            loras = [LoRARequest(f"{name} {i}", first * count + i + 1, f"{room}/{name}") for i in range(count)]

            def generate(tokens: int, own: Any = None if name == "base" else loras) -> list[list[int]]:
                sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
                done = engine.generate(prompts, sampling, lora_request=own, use_tqdm=False)
                return [list(each.outputs[0].token_ids) for each in done]

            figures["tokens"][name] = generate(1 + length)
            cases = {"prompts": partial(generate, 1), "all": partial(generate, 1 + length)}
            times = {case: lower_quartile(own) for case, own in interleaved(cases, 5, rows.device).items()}
            figures |= {f"{name}: prompts, ms": 1e3 * times["prompts"]}
            figures |= {f"{name}: step, ms": 1e3 * (times["all"] - times["prompts"]) / length}
        engine.llm_engine.engine_core.shutdown()
    return figures


def injection(rows: Rows) -> None:
    """Seconds to decompose weights of each shape, and the share of coordinates with the CPU's label."""
    for shape in ((64, 96),) if rows.tiny else SHAPES:
        rows.measure(partial(injection_cost, rows, shape), shape=f"{shape[0]}x{shape[1]}")


def injection_cost(rows: Rows, shape: tuple[int, int]) -> dict[str, Any]:
    weight = torch.nn.init.normal_(torch.empty(shape, device=rows.device), std=0.02)

    def decompose(matrix: torch.Tensor) -> Blocks:
        clear_spectrum_cache()
        return make_partition(matrix, 8)

    costs = rows.cost_of(lambda: decompose(weight), 3)
    own, cpus = decompose(weight), decompose(weight.cpu())
    pairs = (own.row_labels, cpus.row_labels), (own.col_labels, cpus.col_labels)
    same = torch.cat([mine.cpu() == theirs for mine, theirs in pairs]).double().mean().item()
    assert same >= 0.999, f"{same:.5f} of the coordinates have the CPU's label; at least 0.999 must"
    return costs | {"same_labels": same}


PARTS: dict[str, Callable[[Rows], None]] = {
    "layer": layer,
    "model": model,
    "quantized": partial(model, quantized=True),
    "decoding": decoding,
    "fleet": fleet,
    "serve": serve,
    "injection": injection,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ranks", type=int, default=1, help="of tensor parallelism, for `serve`")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    if device.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU; --tiny makes a dry run on the CPU")
    torch.manual_seed(0)
    part = partial(serve, ranks=arguments.ranks) if arguments.part == "serve" else PARTS[arguments.part]
    part(Rows(f"gpu_{arguments.part}", device, arguments.minutes, arguments.tiny))


if __name__ == "__main__":
    main()
