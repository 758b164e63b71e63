"""Checks ``model.options``: keys that belong elsewhere, and misspelt ones of ``quantization_config``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from transformers.quantizers.auto import AutoQuantizationConfig

from smoa_lab.basics.extras import install
from smoa_lab.basics.nearest import nearest
from smoa_lab.config.problems import Problem

PLACE = "model.options.quantization_config"
MISPLACED = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), f"belongs one level deeper, in {PLACE}"),
    **dict.fromkeys(("dtype", "torch_dtype"), "set model.dtype instead"),
    "trust_remote_code": "set model.trust_remote_code instead",
}


def quantization_problems(values: dict[str, Any]) -> Iterable[Problem]:
    """The problems of the quantization that a run's config asks for."""
    model = values.get("model")
    options = model.get("options") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(options, dict):
        return
    for key in options.keys() & MISPLACED.keys():
        yield Problem(("model", "options", key), f"model.options.{key}: {MISPLACED[key]}")
    if "quantization_config" not in options:
        return
    yield from (Problem(("model", "options", "quantization_config", *path), text) for path, text in _block(options))
    if str(model.get("name")).endswith(".gguf"):
        text = f"{PLACE}: a GGUF file is dequantized when loaded; name a model in float32 or bfloat16"
        yield Problem(("model", "options", "quantization_config"), text)
    if values.get("method") == "full":
        yield Problem(
            ("method",), "method: full trains the weights, and quantized weights cannot be trained; choose an adapter"
        )


def _block(options: dict[str, Any]) -> Iterable[tuple[tuple[str, ...], str]]:
    wanted = options["quantization_config"]
    if not isinstance(wanted, dict):
        yield (), f"{PLACE}: must be a block of keys, such as load_in_4bit: true; got {wanted!r}"
        return
    try:
        known = {"quant_method", *inspect.signature(type(AutoQuantizationConfig.from_dict(wanted))).parameters}
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        hint = f"; {install('quantized')}" if isinstance(error, ImportError) else ""
        yield (), f"{PLACE}: {error}{hint}"
        return
    for key in wanted.keys() - known:
        yield (key,), f"{PLACE}.{key}: there is no such key{nearest(key, known)}"
