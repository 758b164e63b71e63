"""The packages that a run will need, by what needs them, so that a missing one is named before any work."""

from __future__ import annotations

from smoa_lab.basics.extras import DRAWING, Needs
from smoa_lab.config.rows_config import RowsConfig
from smoa_lab.config.run_config import ModelSection, RunConfig
from smoa_lab.data.tasks import task_needs
from smoa_lab.models.packaged_models import PACKAGED_MODELS, packaged_name, unpacked_folder
from smoa_lab.scoring.protocol import Protocol

OF_BITSANDBYTES = ("8bit", "paged", "bnb")
"""Parts of the names of optimizers that bitsandbytes has."""


def training_needs(config: RunConfig | RowsConfig) -> Needs:
    """What `smoa train` needs."""
    optimizer = str(config.training.get("optim", ""))
    named = any(part in optimizer for part in OF_BITSANDBYTES)
    return {
        "training": ("accelerate", *DRAWING),
        f"training.optim: {optimizer}": ("bitsandbytes",) if named else (),
        **(input_needs(config) if isinstance(config, RunConfig) else rows_needs(config)),
    }


def rows_needs(config: RowsConfig) -> Needs:
    """What a run on a user's own rows needs for its data and base model."""
    return {"data.train": ("trl", "datasets", "filelock"), **model_needs(config.model)}


def evaluation_needs(config: RunConfig, protocol: Protocol) -> Needs:
    """What `smoa eval` needs."""
    families = {task.family for task in config.data.chosen().values()}
    packages: dict[Protocol, tuple[str, ...]] = {
        "lm-eval": ("lm_eval", "datasets"),
        "generation": ("sacrebleu", "rouge_score") if "dialogue" in families else (),
    }
    return {f"protocol {protocol}": packages.get(protocol, ()), **input_needs(config)}


def input_needs(config: RunConfig) -> Needs:
    """What a run on tasks needs for its data and base model."""
    return {**task_needs(config.data.chosen()), **model_needs(config.model)}


def model_needs(model: ModelSection) -> Needs:
    """What loading a base model needs; a packaged one is unpacked only once."""
    packaged, quantization = packaged_name(model.name), model.options.get("quantization_config") or {}
    own: tuple[str, ...] = ("gguf",) if model.name.endswith(".gguf") else ()
    if packaged is not None and not unpacked_folder(packaged).is_dir():
        own = PACKAGED_MODELS[packaged].needs
    bits = any(quantization.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    return {
        f"model.name: {model.name!r}": own,
        "model.options.quantization_config": ("accelerate", "bitsandbytes") if bits else (),
    }
