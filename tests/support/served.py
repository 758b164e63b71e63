"""Adapters to serve, and whether what a server wrote is what PEFT writes with each of them alone."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig

TIE = 1e-4
"""Two best logits of PEFT's that differ by less may come in either order."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes nearly all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""For a vLLM on a small machine."""


class Answer(NamedTuple):
    """The adapter that was asked, or "base", the tokens it was given and those it wrote."""

    adapter: str
    prompt: Sequence[int]
    written: Sequence[int]


def smollm2() -> Path:
    """The folder into which smoa unpacks SmolLM2 135M."""
    return Path(os.environ.get("SMOA_CACHE", "~/.cache/smoa")).expanduser() / "models" / "smollm2-135m"


def save_adapters(base: Path, room: Path, configs: Mapping[str, PeftConfig], strength: float = 1) -> None:
    """Random adapters; the factors B of SMoA are `strength` times what they are made as."""
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        if isinstance(config, SmoaConfig):
            for parameter in (own for path, own in model.named_parameters() if ".smoa_B." in path):
                parameter.data *= strength
        model.save_pretrained(room / name)


@torch.no_grad()
def differences(base: Path, room: Path, answers: Iterable[Answer]) -> list[tuple[str, int, float]]:
    """Where PEFT, with each adapter alone in float32, would have written another token: the adapter, the token's
    place, and by how much PEFT prefers its own."""
    of_adapter: dict[str, list[Answer]] = {}
    for answer in answers:
        of_adapter.setdefault(answer.adapter, []).append(answer)
    found = []
    for name, own in of_adapter.items():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if name != "base":
            model = PeftModel.from_pretrained(model, str(room / name)).eval()
        for _, prompt, written in own:
            logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
            lost = logits.max(-1).values - logits[range(len(written)), list(written)]
            found += [(name, place, by) for place, by in enumerate(lost.tolist()) if by >= TIE]
    return found
