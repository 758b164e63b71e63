"""The id in both files of a saved adapter, to refuse a config and weights of different saves.

It is a setting in `adapter_config.json` and a tensor of 16 bytes in the weights, because PEFT, transformers and
accelerate all write what `get_peft_model_state_dict` returns. They write the config after that call, in the same
thread: `SmoaConfig.save_pretrained` then takes the id from `COLLECTED`, and the config in memory stays as it is.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from smoa.config.adapter_config import COLLECTED, SmoaConfig
from smoa.files.names import PREFIX

KEY = "smoa_save_id"
BYTES = 16


def new_id(config: SmoaConfig, state_dict: dict[str, Tensor]) -> str:
    """A digest of the settings and of the factors, so that the same adapter is saved in the same bytes."""
    own = {name: getattr(config, name) for name in SmoaConfig.__annotations__}
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in own.items()}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=BYTES)
    for key, tensor in sorted(state_dict.items()):
        if ".smoa_" in key and tensor.device.type != "meta":
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # of rank 0, which writes the files
            digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_id(state_dict: dict[str, Tensor], config: SmoaConfig) -> dict[str, Tensor]:
    """The tensors to save, with an id that the next save of this config writes too."""
    save_id = new_id(config, state_dict)
    COLLECTED.set((config, save_id))
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state_dict) else ""
    return state_dict | {prefix + KEY: torch.tensor(list(bytes.fromhex(save_id)), dtype=torch.uint8)}


def without_id(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors, without the id."""
    return {key: tensor for key, tensor in state_dict.items() if not is_id(key)}


def is_id(key: str) -> bool:
    """Whether this is the name of the id."""
    return key.removeprefix(PREFIX) == KEY
