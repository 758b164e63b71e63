"""Measures batches in which every row has an adapter of its own, beside PEFT's LoRA.

    python benchmarks/fleet.py            all parts, on two threads
    python benchmarks/fleet.py names      one part: names, decoding, gang, loading

The model is like a Llama with random weights: 4 layers of 1024/2816, seven targets. All times of a case are taken in
turn in one process, each after a call of its own that warms the caches, and given as ratios. `names`: a forward
through `adapter_names`, of 32 rows with as many adapters, to the base's, for SMoA with contiguous blocks and r = K = 8
or 32, which has the parameters of LoRA r = 1, and for LoRA r = 1 and 8: a token within `generate`, which keeps what
all adapters share, the same alone, and prompts. `decoding`: `generate` of 48 tokens with one adapter. `gang`: forward
and backward of 32 or 64 adapters with a row each, by their names, compared with as many of one LoRA. `loading`: CPU
seconds of `load_adapter`, the 2nd to the 64th. Writes benchmarks/results/fleet.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from _common import busy_elsewhere, pick_device, provenance, seconds, write_results
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig, keep_in_generate
from smoa.generation import keeping

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = 32
CASES = {"generated": 1, "alone": 1, "prompt 16": 16, "prompt 256": 256}
"""Tokens of each row."""


def base(dtype: torch.dtype) -> LlamaForCausalLM:
    """The model, the same at each call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 512}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=16)).to(dtype).eval()


def smoa(r: int, num_blocks: int, adapters: int, dtype: torch.dtype, partition: str = "contiguous") -> Any:
    settings: dict[str, Any] = {"r": r, "num_blocks": num_blocks, "partition": partition, "init_weights": False}
    return _with_adapters(dtype, lambda: SmoaConfig(**settings, target_modules=TARGETS), adapters)


def lora(r: int, adapters: int, dtype: torch.dtype) -> Any:
    return _with_adapters(dtype, lambda: LoraConfig(r=r, init_lora_weights=False, target_modules=TARGETS), adapters)


def _with_adapters(dtype: torch.dtype, config: Callable[[], Any], adapters: int) -> Any:
    model = get_peft_model(base(dtype), config(), adapter_name="0")
    for number in range(1, adapters):
        model.add_adapter(str(number), config())
    return model.eval()


def names(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Forwards of 32 rows with an adapter each: a token within `generate` and alone, and prompts."""
    plain = base(dtype)
    made: dict[str, Any] = {f"smoa {r}": smoa(r, r, ADAPTERS, dtype) for r in (8, 32)}
    made |= {f"lora {r}": lora(r, ADAPTERS, dtype) for r in (8, 1)}
    own = [str(number) for number in range(ADAPTERS)]
    found: dict[str, Any] = {}
    for case, tokens in CASES.items():
        ids = torch.randint(10, 500, (ADAPTERS, tokens))
        run: dict[str, Callable[[], object]] = {"base": lambda ids=ids: plain(input_ids=ids, use_cache=False)}
        for name, model in made.items():
            run[name] = lambda model=model, ids=ids: model(input_ids=ids, use_cache=False, adapter_names=own)
        kept = keeping(torch.nn.ModuleList(made.values())) if case == "generated" else nullcontext()
        with torch.no_grad(), kept:
            is_long = tokens > 16
            found[case] = _ratios(interleaved(run, 3 if is_long else repeats, warms=not is_long))
            print(case, found[case], flush=True)
    return found


def decoding(dtype: torch.dtype, r: int, partition: str, repeats: int) -> dict[str, Any]:
    """`generate` of 48 tokens after a prompt of 16, with one adapter, of which nothing is kept or the blocks of ΔW."""
    plain, ours, theirs = base(dtype), smoa(r, 8, 1, dtype, partition), lora(8, 1, dtype)
    ids = torch.randint(10, 500, (1, 16))

    def written(model: Any, kept: Any = None) -> Callable[[], object]:
        def run() -> object:
            if kept is not None:
                keep_in_generate(model.get_base_model(), kept)
            return model.generate(input_ids=ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=0)

        return run

    run = {"base": written(plain), "nothing kept": written(ours, "off"), "kept": written(ours, "blocks")}
    return _ratios(interleaved(run | {"lora": written(theirs)}, repeats))


def gang(dtype: torch.dtype, adapters: int, tokens: int, r: int, repeats: int) -> dict[str, Any]:
    """Forward and backward of adapters with a row each, by their names, and one LoRA's as often; AdamW's step."""
    ours, theirs = smoa(r, 8, adapters, dtype).train(), lora(8, 1, dtype).train()
    own = [str(number) for number in range(adapters)]
    ours.set_requires_grad(own)
    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(10, 500, (adapters, tokens))
    steps: list[float] = []

    def together() -> None:
        ours(input_ids=ids, labels=ids, adapter_names=own).loss.backward()

    def one_by_one() -> None:
        for row in ids.split(1):
            theirs(input_ids=row, labels=row).loss.backward()
            theirs.zero_grad()

    times: dict[str, list[float]] = {"gang": [], "lora": []}
    for number in range(repeats + 1):
        found = seconds(together), seconds(one_by_one), seconds(optimizer.step)
        optimizer.zero_grad()
        if number:
            times["gang"].append(found[0])
            times["lora"].append(found[1])
            steps.append(found[2])
    return _ratios(times, "lora") | {"seconds of a step of AdamW": round(statistics.median(steps), 4)}


def loading(layers: int, adapters: int = 64) -> dict[str, Any]:
    """CPU seconds of `load_adapter` for the first, the middle and the last of some adapters of a narrow Llama."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 64}

    def narrow() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))

    configs: dict[str, Any] = {
        "smoa": SmoaConfig(r=8, num_blocks=8, init_weights=False, target_modules=TARGETS),
        "lora": LoraConfig(r=1, init_lora_weights=False, target_modules=TARGETS),
    }
    with tempfile.TemporaryDirectory() as folder:
        models, times = {}, dict[str, list[float]]()
        for name, config in configs.items():
            get_peft_model(narrow(), config).save_pretrained(f"{folder}/{name}")
            models[name] = PeftModel.from_pretrained(narrow(), f"{folder}/{name}", "0")
        for number in range(1, adapters):
            for name, model in models.items():
                start = time.process_time()
                model.load_adapter(f"{folder}/{name}", str(number))
                times.setdefault(name, []).append(time.process_time() - start)
    places = {"2nd": 0, "32nd": 30, "64th": 62}
    return {
        f"{name}, {place}": round(own[number], 3) for name, own in times.items() for place, number in places.items()
    }


def interleaved(
    functions: Mapping[Any, Callable[[], object]], repeats: int, warms: bool = True
) -> dict[Any, list[float]]:
    """Times of each function, called in turn; the weights of another model have left the caches, so each runs twice,
    unless it takes seconds."""
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if warms:
                function()
            times[name].append(seconds(function))
    return times


def _ratios(times: dict[str, list[float]], against: str = "base") -> dict[str, Any]:
    """Medians to that of one."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"seconds": medians[against]} | {name: round(value / medians[against], 3) for name, value in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["names", "decoding", "gang", "loading"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    others, found = busy_elsewhere(), {}
    f32, bf16, repeats = torch.float32, torch.bfloat16, arguments.repeats
    if "names" in arguments.parts:
        found["names"] = names(f32, repeats)
    if "decoding" in arguments.parts:
        for dtype, r, partition in (
            (f32, 8, "spectral"),
            (f32, 8, "contiguous"),
            (bf16, 8, "spectral"),
            (f32, 64, "spectral"),
        ):
            case = f"decoding: r = {r}, {partition}, {str(dtype)[6:]}"
            print(case, found.setdefault(case, decoding(dtype, r, partition, repeats // 2)), flush=True)
    if "gang" in arguments.parts:
        for dtype, adapters, tokens, r in ((f32, 64, 16, 8), (f32, 32, 16, 8), (bf16, 32, 16, 8), (bf16, 32, 64, 8)):
            case = f"gang: {adapters} rows x {tokens} tokens, r = {r}, {str(dtype)[6:]}"
            print(case, found.setdefault(case, gang(dtype, adapters, tokens, r, repeats // 2)), flush=True)
    if "loading" in arguments.parts:
        for layers in (6, 30):
            case = f"loading: {7 * layers} adapted layers"
            print(case, found.setdefault(case, loading(layers)), flush=True)
    if not arguments.dry:
        content = {"cases": found, "cores_busy_elsewhere": others(), "provenance": provenance(pick_device("cpu"))}
        print(write_results("fleet", content))


if __name__ == "__main__":
    main()
