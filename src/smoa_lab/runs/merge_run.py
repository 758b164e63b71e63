"""``smoa merge``: finds the base model that an adapter was trained on, and has the two merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig

import smoa  # noqa: F401  (registers SMoA with PEFT)
from smoa.errors import ConfigError
from smoa.export.merge import Dtype, Export, merge_and_save
from smoa_lab.cache import cache_folder
from smoa_lab.config.run_config import load_config
from smoa_lab.training.base_models import PACKAGED_MODEL, BaseModel, load_base_model, prepare_packaged_model
from smoa_lab.training.run_folder import RunFolder

GGUF_NOTE = (
    "The base came as GGUF: the adapter is merged into its dequantised weights, which is what it was trained on."
)


def merge(
    adapter: str | Path,
    output: str | Path,
    dtype: Dtype = "auto",
    base: str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int | str = "5GB",
) -> Export:
    """Merge an adapter (its folder, or a run's) in float32 and save the whole model with its tokenizer.

    The base is the one that the run loaded: also a GGUF file, ``gemma3-270m``, or one quantised while loading.

    Raises:
        ConfigError: ``output`` exists, or ``adapter`` is none.
        DataError: the base model cannot be loaded.
        MergeError: a merged weight is not finite, or not in range of ``dtype``.
    """
    source = adapter_folder(adapter)
    if Path(output).exists():
        raise ConfigError(f"{output}: exists; choose another folder")
    name = base or str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "trust_remote_code": trust_remote_code}
    quantised = None if base else _quantised_while_loading(Path(adapter))
    if name.endswith(".gguf") or quantised is not None:
        wanted = quantised or BaseModel(name, "float32", trust_remote_code)
        model, tokenizer = load_base_model(wanted)
        notes = () if quantised else (GGUF_NOTE,)
        return merge_and_save(source, output, base=model, dtype=dtype, tokenizer=tokenizer, notes=notes, **options)
    packaged = name in (PACKAGED_MODEL, str(cache_folder() / "models" / PACKAGED_MODEL))
    folder = str(prepare_packaged_model()) if packaged else name
    notes = (GGUF_NOTE,) if packaged else ()
    return merge_and_save(source, output, base=folder, dtype=dtype, notes=notes, **options)


def adapter_folder(place: str | Path) -> Path:
    """The folder with ``adapter_config.json``: ``place`` itself or a run's adapter."""
    for folder in (Path(place), RunFolder(Path(place)).adapter):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ConfigError(f"{place}: holds no adapter (adapter_config.json), nor does {place}/adapter")


def _quantised_while_loading(run: Path) -> BaseModel | None:
    """What to load where the run's config has a plain checkpoint quantised on its way into memory."""
    file = RunFolder(run).config
    if not file.is_file():
        return None
    model = load_config(file).model
    return BaseModel(**model.model_dump()) if "quantization_config" in model.options else None
