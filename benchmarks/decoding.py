"""Measures what an unmerged adapter costs in token-by-token decoding of Gemma 3 270M.

    python benchmarks/decoding.py

float32, one sequence. All routes decode the same number of tokens greedily after the same prompt, in turn in one
process: the base model, SMoA merged, SMoA unmerged as `generate` does by default (the blocks of ΔW kept for each call),
with `smoa.cached_weights`, with neither, and LoRA unmerged with as many trainable parameters. Prefill (the prompt and
the first token) and decoding (the other tokens) are timed apart; the default fills its cache in the prefill. That of
`cached_weights` stays open, as in a server; the time to fill it is reported separately.
Writes benchmarks/results/decoding.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from _common import busy_elsewhere, pick_device, provenance, seconds, write_results
from _gemma import gemma
from _layers import lower_quartile
from torch import Tensor, nn

import smoa
from smoa.tuner.generation import caches_of_generate

Keeping = Callable[[nn.Module], AbstractContextManager[None]]
BARS = {"merged": 1.00, "cached": 1.10}


class Decoder:
    """Decodes greedily with the key-value cache.

    Args:
        model: The model.
        prompt: Its input, (1, length).
        tokens: How many to decode.
        keeping: Makes the context of each call.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, tokens: int, keeping: Keeping) -> None:
        self.model, self.prompt, self.tokens, self.keeping = model.eval(), prompt, tokens, keeping

    @torch.inference_mode()
    def __call__(self) -> tuple[float, float]:
        """Seconds of prefill and of decoding. Afterwards `answer` holds the tokens, and `kept` the bytes kept."""
        self.past, self.answer, device = None, [self.prompt], self.prompt.device
        with self.keeping(self.model):
            times = seconds(self.step, device), seconds(self.steps, device)
            self.kept = cache_bytes(self.model)
        return times

    def step(self) -> None:
        """Decode one token."""
        outputs = self.model(input_ids=self.answer[-1], past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = outputs.past_key_values
        self.answer.append(outputs.logits[:, -1].argmax(-1, keepdim=True))

    def steps(self) -> None:
        """Decode the other tokens."""
        for _ in range(self.tokens - 1):
            self.step()

    def text(self) -> Tensor:
        """The tokens of the last call."""
        return torch.cat(self.answer, 1)


def cache_bytes(model: nn.Module) -> int:
    """Bytes in the open caches of a model."""
    caches = [getattr(module, "smoa_weight_cache", None) for module in model.modules()]
    return sum(cache.nbytes() for cache in caches if cache is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    prompt = torch.randint(10, 200_000, (1, arguments.prompt), device=device)
    ours = dict.fromkeys(("merged", "default", "cached", "unmerged"), "smoa")
    names = {"base": "base"} | ours | {"lora": "lora"}
    models = {}
    for route, method in names.items():
        torch.manual_seed(0)
        models[route] = gemma(method, arguments.r, arguments.num_blocks, device)
    models["merged"].merge_adapter()
    with smoa.cached_weights(models["cached"]):
        compare(models, prompt, arguments)


def compare(models: dict[str, nn.Module], prompt: Tensor, arguments: argparse.Namespace) -> None:
    """Time every route, and print and write the result."""
    device = prompt.device
    contexts: dict[str, Keeping] = {"default": caches_of_generate}
    decoders = {
        route: Decoder(model, prompt, arguments.tokens, contexts.get(route, lambda _: nullcontext()))
        for route, model in models.items()
    }
    filling, _ = decoders["cached"]()
    filled, _ = decoders["cached"]()
    for decode in decoders.values():
        decode()
    plain = decoders["unmerged"].text()
    same = {route: (decoders[route].text() == plain).float().mean().item() for route in ("default", "cached")}
    others = busy_elsewhere()
    phases: dict[str, list[tuple[float, float]]] = {route: [] for route in decoders}
    for _ in range(arguments.repeats):
        for route, decode in decoders.items():
            phases[route].append(decode())
    times = {route: [sum(pair) for pair in pairs] for route, pairs in phases.items()}
    quickest = {name: lower_quartile(values) for name, values in times.items()}
    of_phase = {
        phase: {route: lower_quartile([pair[index] for pair in pairs]) for route, pairs in phases.items()}
        for index, phase in enumerate(("prefill", "decode"))
    }
    result = {
        "config": vars(arguments),
        "bars": BARS,
        "seconds": times,
        "phase_seconds": phases,
        "tokens_per_second": {name: arguments.tokens / value for name, value in quickest.items()},
        "ratio": {name: value / quickest["base"] for name, value in quickest.items()},
        "ratio_of_fastest": {name: min(values) / min(times["base"]) for name, values in times.items()},
        "phase_ratio": {
            phase: {route: value / values["base"] for route, value in values.items()}
            for phase, values in of_phase.items()
        },
        "same_tokens_with_and_without_cache": same,
        "seconds_to_fill_cache": filling - filled,
        "cache_bytes": decoders["cached"].kept,
        "default_cache_bytes": decoders["default"].kept,
        "model_bytes": sum(p.nbytes for p in models["base"].parameters()),
        "cores_busy_elsewhere": others(),
        "provenance": provenance(device),
    }
    for name, value in quickest.items():
        apart = ", ".join(f"{phase} {ratio[name]:.3f}" for phase, ratio in result["phase_ratio"].items())
        fastest = f"fastest {result['ratio_of_fastest'][name]:.3f}"
        print(f"{name:10} {value:.3f} s  {result['ratio'][name]:.3f} ({fastest}), {apart}")
    shown = "same_tokens_with_and_without_cache", "cache_bytes", "default_cache_bytes", "seconds_to_fill_cache"
    print({key: result[key] for key in shown})
    print(write_results("decoding", result))


if __name__ == "__main__":
    main()
