"""The id that both files of an adapter hold, to refuse the config of one adapter with the weights of another.

In `adapter_config.json` it is a setting, among the weights a tensor of 16 bytes: PEFT, transformers and accelerate all
write what `get_peft_model_state_dict` returns. An adapter keeps its id when it is loaded and saved again.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from smoa.config.adapter_config import SmoaConfig
from smoa.files.names import PREFIX

KEY = "smoa_save_id"
BYTES = 16


def new_id(config: SmoaConfig) -> str:
    """An id for a fresh adapter, from its settings and the random state: a repeated run saves the same bytes."""
    own = {
        name: getattr(config, name) for name in SmoaConfig.__dataclass_fields__ if name in SmoaConfig.__annotations__
    }
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in own.items()}
    settings.pop("save_id")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()[: 2 * BYTES]


def with_id(state_dict: dict[str, Tensor], save_id: str) -> dict[str, Tensor]:
    """What is to be saved, and the id."""
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state_dict) else ""
    return state_dict | {prefix + KEY: torch.tensor(list(bytes.fromhex(save_id)), dtype=torch.uint8)}


def without_id(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was saved, but for the id."""
    return {key: tensor for key, tensor in state_dict.items() if not is_id(key)}


def is_id(key: str) -> bool:
    """Whether a tensor of that name is an id."""
    return key.removeprefix(PREFIX) == KEY
