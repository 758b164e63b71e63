"""Lets vLLM find the folder of an adapter that a request names and nobody has loaded.

vLLM's own resolver takes LoRA's folders alone. This one looks in the same place, the environment variable
`VLLM_LORA_RESOLVER_CACHE_DIR`, by the same rules: a folder of the adapter's name whose config names the served base.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from smoa.vllm.saved import saved_config

PLACE = "VLLM_LORA_RESOLVER_CACHE_DIR"


def register_resolver() -> None:
    """Register a resolver with vLLM, if the environment names a folder."""
    if not (place := os.environ.get(PLACE, "")):
        return
    resolvers: Any = importlib.import_module("vllm.lora.resolver")
    request: Any = importlib.import_module("vllm.lora.request").LoRARequest

    class SmoaResolver(resolvers.LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            folder = folder_of(Path(place), base_model_name, lora_name)
            return None if folder is None else request(lora_name, number_of(lora_name), str(folder))

    if "smoa" not in resolvers.LoRAResolverRegistry.get_supported_resolvers():
        resolvers.LoRAResolverRegistry.register_resolver("smoa", SmoaResolver())


def folder_of(place: Path, base: str, name: str) -> Path | None:
    """The folder of the SMoA adapter `name` of the model `base`; None if there is none right in `place`."""
    folder, is_there = place / name, False
    with suppress(OSError):  # of a name that is too long
        is_there = folder.is_dir()
    if Path(name).name != name or name in ("", "..") or not is_there:  # it leads elsewhere, or to no folder
        return None
    config = saved_config(folder)
    is_ours = config.get("peft_type") == "SMOA" and config.get("base_model_name_or_path") == base
    return folder if is_ours else None


def number_of(name: str) -> int:
    """vLLM knows an adapter by a positive number: the same in all of its processes."""
    return int.from_bytes(sha256(name.encode()).digest()[:7], "big") + 1
