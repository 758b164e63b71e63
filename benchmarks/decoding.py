"""Measures what an unmerged adapter costs in token-by-token decoding of Gemma 3 270M.

    python benchmarks/decoding.py

float32, one sequence. All routes decode the same number of tokens greedily after the same prompt, in turn in one
process: the base model, SMoA merged, SMoA unmerged with and without `smoa.cached_weights`, and LoRA unmerged with as
many trainable parameters. The cache stays open, as in a server; the time to fill it is reported separately.
Writes benchmarks/results/decoding.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _common import busy_elsewhere, interleaved, pick_device, provenance, seconds, write_results
from _gemma import gemma
from _layers import lower_quartile
from torch import Tensor, nn

import smoa

BARS = {"merged": 1.00, "cached": 1.10}


def decoder(model: nn.Module, prompt: Tensor, tokens: int) -> Callable[[], Tensor]:
    """A function that decodes greedily with the key-value cache and returns the tokens."""
    model.eval()

    @torch.inference_mode()
    def decode() -> Tensor:
        step, past, answer = prompt, None, []
        for _ in range(tokens):
            outputs = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
            step, past = outputs.logits[:, -1].argmax(-1, keepdim=True), outputs.past_key_values
            answer.append(step)
        return torch.cat(answer, 1)

    return decode


def cache_bytes(model: nn.Module) -> int:
    """Bytes in the open `cached_weights` of a model."""
    caches = [module.smoa_weight_cache for module in model.modules() if hasattr(module, "smoa_weight_cache")]
    return sum(cache.effective.nbytes for cache in caches)


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
    names = {"base": "base", "merged": "smoa", "cached": "smoa", "unmerged": "smoa", "lora": "lora"}
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
    decoders = {route: decoder(model, prompt, arguments.tokens) for route, model in models.items()}
    filling = seconds(decoder(models["cached"], prompt, 1), device)
    filled = seconds(decoder(models["cached"], prompt, 1), device)
    same = (decoders["cached"]() == decoders["unmerged"]()).float().mean().item()
    interleaved(decoders, 1, device)
    others = busy_elsewhere()
    times = interleaved(decoders, arguments.repeats, device)
    quickest = {name: lower_quartile(values) for name, values in times.items()}
    result = {
        "config": vars(arguments),
        "bars": BARS,
        "seconds": times,
        "tokens_per_second": {name: arguments.tokens / value for name, value in quickest.items()},
        "ratio": {name: value / quickest["base"] for name, value in quickest.items()},
        "ratio_of_fastest": {name: min(values) / min(times["base"]) for name, values in times.items()},
        "same_tokens_with_and_without_cache": same,
        "seconds_to_fill_cache": filling - filled,
        "cache_bytes": cache_bytes(models["cached"]),
        "model_bytes": sum(p.nbytes for p in models["base"].parameters()),
        "cores_busy_elsewhere": others(),
        "provenance": provenance(device),
    }
    for name, value in quickest.items():
        print(f"{name:10} {value:.3f} s  {result['ratio'][name]:.3f} (fastest {result['ratio_of_fastest'][name]:.3f})")
    print({key: result[key] for key in ("same_tokens_with_and_without_cache", "cache_bytes", "seconds_to_fill_cache")})
    print(write_results("decoding", result))


if __name__ == "__main__":
    main()
