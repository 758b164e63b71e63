"""Runs a study of names and numbers as ``smoa compare`` does, to the same bits and sooner: while training, the frozen
layers below the adapted ones compute each row once, and its hidden states are kept.

    OMP_NUM_THREADS=1 python studies/recall-searched/run.py [STUDY [options of smoa compare]]

Without a file it is the study of this folder.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from smoa_lab.cli.main import app

FIRST_ADAPTED = 28
TIMED = 256
"""More rows than the steps have that time the entries: were any kept by then, the first entry would seem slower."""


def keep_beginnings() -> None:
    """Let layers 0 to 27 give back what they gave for the same rows; rows are known by their padded embeddings."""
    whole, known = LlamaDecoderLayer.forward, dict[bytes, torch.Tensor]()
    keys: list[bytes] = []

    def forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        index = layer.self_attn.layer_idx
        if index >= FIRST_ADAPTED or not layer.training or kwargs.get("cache") is not None:
            return whole(layer, hidden_states, *args, **kwargs)
        if index == 0:
            rows = hidden_states.detach().view(torch.int16).numpy()
            keys[:] = [hashlib.sha1(row.tobytes()).digest() for row in rows]
        if len(known) > TIMED and all(key in known for key in keys):
            return torch.stack([known[key] for key in keys]) if index == FIRST_ADAPTED - 1 else hidden_states
        out = whole(layer, hidden_states, *args, **kwargs)
        if index == FIRST_ADAPTED - 1:
            known.update(zip(keys, out.detach().unbind(), strict=True))
        return out

    LlamaDecoderLayer.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    keep_beginnings()
    sys.argv[1:] = ["compare", *(sys.argv[1:] or [str(Path(__file__).with_name("study.yaml"))])]
    app()
