"""The id in both files of an adapter, to refuse a config and weights of different adapters.

It is a setting in `adapter_config.json` and a tensor of 16 bytes in the weights, because PEFT, transformers and
accelerate all write what `get_peft_model_state_dict` returns. An adapter that is loaded and saved again keeps its id.
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
    """An id from an adapter's settings and the random state, so that a repeated run saves the same bytes."""
    own = {name: getattr(config, name) for name in SmoaConfig.__annotations__}
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in own.items()}
    settings.pop("save_id")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()[: 2 * BYTES]


def with_id(state_dict: dict[str, Tensor], save_id: str) -> dict[str, Tensor]:
    """The tensors to save, with the id."""
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state_dict) else ""
    return state_dict | {prefix + KEY: torch.tensor(list(bytes.fromhex(save_id)), dtype=torch.uint8)}


def without_id(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors, without the id."""
    return {key: tensor for key, tensor in state_dict.items() if not is_id(key)}


def is_id(key: str) -> bool:
    """Whether this is the name of the id."""
    return key.removeprefix(PREFIX) == KEY
