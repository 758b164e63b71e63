"""vLLM serves SMoA adapters in its LoRA slots, beside LoRA and the base model, in one batch.

With smoa there, `vllm serve BASE --enable-lora -cc.cudagraph_mode=PIECEWISE --lora-modules anna=adapters/anna` is all:
vLLM finds `register` by its entry point. Loading, eviction, scheduling and prefix caching are vLLM's own.
"""

from __future__ import annotations


def register() -> None:
    """Let this process' vLLM serve SMoA adapters. A vLLM that lacks a name needed for it stays as it is."""
    from smoa.serving.vllm.plugin import install
    from smoa.serving.vllm.resolver import register_resolver

    if install():
        register_resolver()
