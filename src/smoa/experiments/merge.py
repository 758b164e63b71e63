"""``smoa merge``: a model of its own out of base and adapter, in a dtype of choice, with a measure of what it lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

import smoa  # noqa: F401  (registers SMoA with PEFT)
from smoa.errors import ConfigError, MergeError
from smoa.experiments.base_models import BaseModel, load_base_model
from smoa.experiments.cache import new_folder
from smoa.experiments.run_folder import RunFolder


@dataclass(frozen=True)
class Merged:
    """Where the model lies, how many layers changed, and ‖rounding error‖ / ‖update‖ over all of them."""

    folder: Path
    layers: int
    update_lost: float


def merge(
    adapter: str | Path,
    output: str | Path,
    dtype: str = "float32",
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge an adapter (its folder, or a run's) in float32 and save the whole model with its tokenizer in ``dtype``.

    SMoA's updates are relative to the weights: in bfloat16 an entry that changes by less than a 512th stays as it is.
    ``update_lost`` says how much of the update that was; float32 loses nothing that matters.

    Raises:
        ConfigError: ``output`` exists, or ``adapter`` is none.
        MergeError: a merged weight is not finite, or not in range of ``dtype``.
    """
    target, source = Path(output), adapter_folder(adapter)
    if target.exists():
        raise ConfigError(f"{target}: exists; choose another folder")
    name = base or str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    model, tokenizer = load_base_model(BaseModel(name, "float32", trust_remote_code))
    adapted: Any = PeftModel.from_pretrained(model, str(source))
    before = _adapted_weights(adapted)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise MergeError(f"{source}: {error}") from error
    after = dict(merged.named_parameters())
    wanted: torch.dtype = getattr(torch, dtype)
    lost = _update_lost(before, after, wanted)
    with new_folder(target) as temporary:
        merged.to(wanted).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Merged(target, len(before), lost)


def adapter_folder(place: str | Path) -> Path:
    """The folder with ``adapter_config.json``: ``place`` itself or a run's adapter."""
    for folder in (Path(place), RunFolder(Path(place)).adapter):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ConfigError(f"{place}: holds no adapter (adapter_config.json), nor does {place}/adapter")


def _adapted_weights(adapted: PeftModel) -> dict[str, Tensor]:
    """Copies of the weights that merging will change, by their name in the merged model."""
    tuner: Any = adapted.base_model
    return {
        f"{path}.weight": weight.detach().clone()
        for path, module in tuner.model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and isinstance(weight := getattr(module.get_base_layer(), "weight", None), Tensor)
    }


def _update_lost(before: dict[str, Tensor], after: dict[str, Tensor], dtype: torch.dtype) -> float:
    update = error = 0.0
    for name, weight in before.items():
        rounded = after[name].detach().to(dtype)
        if not torch.isfinite(rounded).all():
            raise MergeError(f"{name}: the merged weight leaves the range of {dtype}; use float32 or bfloat16")
        update += float((after[name].detach() - weight).double().square().sum())
        # What counts is the change that is left after both weights are rounded.
        change = rounded.float() - weight.to(dtype).float()
        error += float((change - (after[name].detach() - weight)).double().square().sum())
    return (error / update) ** 0.5 if update else 0.0
