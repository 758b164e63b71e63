"""The id in both files of a saved adapter, to refuse a config and weights that don't belong together.

It is a setting in `adapter_config.json` and a tensor of 16 bytes in the weights, because PEFT, transformers and
accelerate all write what `get_peft_model_state_dict` returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoa.config.adapter_config import SmoaConfig
from smoa.files.names import PREFIX

KEY = "smoa_save_id"
BYTES = 16


def with_id(state_dict: dict[str, Tensor], config: SmoaConfig) -> dict[str, Tensor]:
    """The tensors to save, with the id that the config writes too, if it has one."""
    save_id = config.make_save_id()
    if save_id is None:
        return state_dict
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state_dict) else ""
    return state_dict | {prefix + KEY: torch.tensor(list(bytes.fromhex(save_id)), dtype=torch.uint8)}


def without_id(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors, without the id."""
    return {key: tensor for key, tensor in state_dict.items() if not is_id(key)}


def is_id(key: str) -> bool:
    """Whether this is the name of the id."""
    return key.removeprefix(PREFIX) == KEY
