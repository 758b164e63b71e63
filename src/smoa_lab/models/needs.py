"""The packages that a run will need, by what needs them, so that a missing one is named before any work."""

from __future__ import annotations

from smoa_lab.basics.extras import DRAWING, Needs
from smoa_lab.config.run import ModelSection, RunConfig
from smoa_lab.data.tasks import task_needs
from smoa_lab.models.packaged_models import PACKAGED_MODELS, packaged_name, unpacked_folder

OF_BITSANDBYTES = ("8bit", "paged", "bnb")
"""Parts of the names of optimizers that bitsandbytes has."""


def training_needs(config: RunConfig) -> Needs:
    """What `smoa train` needs."""
    optimizer = str(config.training.get("optim", ""))
    named = any(part in optimizer for part in OF_BITSANDBYTES)
    return {
        "training": ("accelerate", "trl", *DRAWING),
        f"training.optim: {optimizer}": ("bitsandbytes",) if named else (),
        **data_needs(config),
    }


def evaluation_needs(config: RunConfig, protocol: str) -> Needs:
    """What `smoa eval` needs."""
    overlap = protocol == "generation" and any(task.family == "dialogue" for task in config.questions.chosen().values())
    return {f"protocol {protocol}": ("sacrebleu", "rouge_score") if overlap else (), **data_needs(config)}


def data_needs(config: RunConfig) -> Needs:
    """What a run needs for its data and base model."""
    rows = {"data.train": ("trl", "datasets", "filelock")}
    return {**(rows if config.has_rows else task_needs(config.questions.chosen())), **model_needs(config.model)}


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
