"""Merges an adapter, or a run's, into the base model that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smoa.atomic import check_place
from smoa.export.merge import Dtype, Export, merge_and_save
from smoa_lab.base_models import described_base, load_base_model, packaged_name, prepare_packaged_model
from smoa_lab.data.chat_templates import saved_chat_template
from smoa_lab.open_run import adapter_of_run, base_section

GGUF_NOTE = "The base is a GGUF file: the adapter is merged into its dequantized weights, on which it was trained."


def merge_run(
    adapter: str | Path,
    output: str | Path,
    dtype: Dtype = "auto",
    base: str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int | str = "5GB",
) -> Export:
    """Merge an adapter (its folder, or a run's) in float32 and save the whole model with its tokenizer.

    The base is the one that the run loaded, which may be a GGUF file, a packaged model, or quantized while loading.

    Raises:
        ConfigError: ``output`` exists, or ``adapter`` contains no adapter.
        DataError: the base model cannot be loaded.
        MergeError: a merged weight is not finite, or not in range of ``dtype``.
    """
    source = adapter_of_run(adapter)
    check_place(Path(output), is_new=True)
    wanted = base_section(source, base, trust_remote_code)
    quantized, packaged = "quantization_config" in wanted.options, packaged_name(wanted.name)
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "trust_remote_code": trust_remote_code}
    options["base_name"] = described_base(wanted.name)
    options["notes"] = (GGUF_NOTE,) if not quantized and (packaged or wanted.name.endswith(".gguf")) else ()
    if not quantized and not wanted.name.endswith(".gguf"):
        place = str(prepare_packaged_model(packaged)) if packaged else wanted.name
        return merge_and_save(source, output, base=place, dtype=dtype, **options)
    model, tokenizer = load_base_model(wanted)
    tokenizer.chat_template = saved_chat_template(source) or tokenizer.chat_template
    return merge_and_save(source, output, base=model, dtype=dtype, tokenizer=tokenizer, **options)
