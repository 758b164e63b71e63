"""Merges an adapter, or a run's, into the base model that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smoa.atomic import check_place
from smoa.export.merge import Dtype, Export, merge_and_save
from smoa_lab.base_models import described_base, load_base_model, packaged_name, prepare_packaged_model
from smoa_lab.config.run import ModelSection, load_config
from smoa_lab.data.chat_templates import saved_chat_template
from smoa_lab.open_run import adapter_of_run, base_name
from smoa_lab.training.run_folder import RunFolder

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
    name = base_name(source, base)
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "trust_remote_code": trust_remote_code}
    options["base_name"] = described_base(name)
    config, quantized = RunFolder(Path(adapter)).config, None
    if base is None and config.is_file():  # which may quantize a plain checkpoint while loading it
        model_section = load_config(config, trust_remote_code=trust_remote_code).model
        quantized = model_section if "quantization_config" in model_section.options else None
    if name.endswith(".gguf") or quantized is not None:
        wanted = quantized or ModelSection(name=name, dtype="float32", trust_remote_code=trust_remote_code)
        model, tokenizer = load_base_model(wanted)
        tokenizer.chat_template = saved_chat_template(source) or tokenizer.chat_template
        notes = () if quantized else (GGUF_NOTE,)
        return merge_and_save(source, output, base=model, dtype=dtype, tokenizer=tokenizer, notes=notes, **options)
    packaged = packaged_name(name)
    folder = str(prepare_packaged_model(packaged)) if packaged else name
    notes = (GGUF_NOTE,) if packaged else ()
    return merge_and_save(source, output, base=folder, dtype=dtype, notes=notes, **options)
