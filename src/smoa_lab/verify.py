"""Checks that a merged model or another adapter says what an adapter says: by the logits after ten prompts.

Of the change that the adapter makes to the base's logits, the share that a target makes too has to be near one, and
what else it changes has to be small. The largest difference alone would pass an untouched base in bfloat16.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft.utils import CONFIG_NAME
from rich.filesize import decimal
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from smoa import ConfigError
from smoa_lab.base_models import RunModel, load_weights
from smoa_lab.basics.folders import read_stored
from smoa_lab.config.run import ModelSection
from smoa_lab.data.general_text import STORY, passages
from smoa_lab.merge import Merged, merge_in_memory, plain_base
from smoa_lab.open_run import open_place, resize_as_saved, with_saved_adapter
from smoa_lab.scoring.losses import logits_at

logger = logging.getLogger(__name__)

PROMPTS, WORDS = 10, 24
"""How many prompts there are, and how long each is."""
TOLERANCE = 0.1
"""By how much the share of the adapter's change that a target has may differ from one."""
NOISE = 1.0
"""How large, relative to that change, what else a target changes may be."""
IN_MEMORY = "merged"
"""The target that is merged in memory."""


@dataclass(frozen=True)
class Verdict:
    """``share`` is how much of what the adapter changes is there: ⟨target − base', adapter − base⟩ / ‖adapter − base‖²
    over all logits, base' rounded as the target's weights are; ``noise`` is ‖what else the target changes‖ / ‖adapter −
    base‖, and ``difference`` the largest between two logits of adapter and target, relative to the largest logit."""

    target: str
    share: float
    noise: float
    difference: float

    @property
    def agrees(self) -> bool:
        return abs(self.share - 1) <= TOLERANCE and self.noise <= NOISE

    def line(self) -> str:
        """The verdict for people."""
        return (
            f"{'agrees' if self.agrees else 'DIFFERS'}  {self.target}: has {self.share:.1%} of what the adapter "
            f"changes, noise {self.noise:.1%}; largest difference of a logit {self.difference:.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"agrees": self.agrees}


@torch.no_grad()
def verify(place: str | Path, targets: Sequence[str] = (IN_MEMORY,), base: str | None = None) -> list[Verdict]:
    """Compare an adapter, unmerged and in float32, with what it was made into.

    A target is a folder with a merged model or with another adapter of the base, such as a LoRA; or ``merged``, which
    merges in memory. Each is loaded by itself, on a base that no adapter has touched. Raises ConfigError for a target
    that is neither, and where the adapter changes nothing.
    """
    opened = open_place(place, base)
    adapter = opened.adapter
    for target in targets:
        if target != IN_MEMORY and not any(Path(target, name).is_file() for name in (CONFIG_NAME, MODEL_CONFIG_NAME)):
            raise ConfigError(f"--against {target}: is neither merged, nor a model's folder, nor an adapter's")
    logger.info("Comparing the logits after %d prompts", PROMPTS)
    prompts = [" ".join(text.split()[:WORDS]) for text in passages(STORY)[:PROMPTS]]
    ids = [opened.model.tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    model = _plain(opened.model)
    untouched = {torch.float32: logits_after(model, ids)}
    own = logits_after(with_saved_adapter(model, adapter), ids)
    del model
    change, largest = (own - untouched[torch.float32]).double(), float(own.abs().max())
    if not change.any():
        raise ConfigError(f"{adapter}: changes nothing: it is untrained, or of another model")
    verdicts = []
    for target in targets:
        dtype = torch.float32
        if target == IN_MEMORY:
            other: Any = merge_in_memory(_plain(opened.model), adapter, Merged(Path(target), ""))
        elif Path(target, CONFIG_NAME).is_file():
            other = with_saved_adapter(_plain(opened.model), Path(target))
        else:
            other, dtype = load_weights(ModelSection(name=target, dtype="float32"))[0], saved_dtype(Path(target))
        found = logits_after(other, ids)
        if dtype not in untouched:
            rounded = _plain(opened.model)
            for weight in rounded.parameters():  # not rotary buffers, which stay in float32
                weight.data = weight.data.to(dtype).float()
            untouched[dtype] = logits_after(rounded, ids)
        there, size = (found - untouched[dtype]).double(), float(change.square().sum())
        share = float((change * there).sum()) / size
        noise = float((there - share * change).norm()) / size**0.5
        verdicts.append(Verdict(target, share, noise, float((found - own).abs().max()) / largest))
    return verdicts


def verify_merged(place: str | Path, folder: Path, base: str | None = None) -> Verdict | None:
    """The verdict on a merged model that was just saved; None, with a note in the log, where it doesn't fit into the
    memory that is free."""
    saved = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = saved * torch.float32.itemsize // saved_dtype(folder).itemsize
    if needed > (free := psutil.virtual_memory().available):
        told = "%s: isn't compared with the adapter: in float32 it takes %s of memory, and %s are free"
        logger.warning(told, folder, decimal(needed), decimal(free))
        return None
    return verify(place, [str(folder)], base)[0]


def _plain(model: RunModel) -> PreTrainedModel:
    """The base in float32, with as many tokens as the adapter's embeddings."""
    loaded, _ = plain_base(model)
    if model.adapter is not None:
        resize_as_saved(loaded, model.adapter)
    return loaded


def saved_dtype(folder: Path) -> torch.dtype:
    """In which dtype a model's weights are saved, by its config."""
    config = read_stored(folder / MODEL_CONFIG_NAME)
    found: torch.dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    return found


@torch.no_grad()
def logits_after(model: Any, ids: Sequence[Tensor]) -> Tensor:
    """Those after each prompt, in float32: (prompts, vocabulary)."""
    model.eval()
    found = []
    for each in ids:
        with logits_at(model, torch.arange(each.shape[1])[None] == each.shape[1] - 1):
            found.append(model(input_ids=each.to(model.device)).logits[:, -1].float().cpu())
    return torch.cat(found)
