"""Is it better if all layers of an encoder share one partition of the residual stream?

    python studies/run.py partition-headlines

With a partition of its own in each layer, block k of one layer feeds all blocks of the next. Contiguous blocks cut the
residual stream alike in every layer. This study, partition-headlines, adds two methods that `smoa` doesn't
have: the residual stream cut at random, or by the spectral scores of all layers that read or write it together, and
alike in all of them. The other side of each layer, heads or inner features, is cut into runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import Blocks
from smoa.maths.scale import MODULATIONS, block_scale
from smoa.maths.spectrum import gram_scores, labels_from_scores
from smoa_lab.config.methods import PRESETS, Method
from smoa_lab.config.run import RunConfig
from smoa_lab.inspect import adapted_layers
from smoa_lab.study.runner import ClassificationRunner

RANDOM, SPECTRAL = "smoa-shared-random", "smoa-shared-spectral"
READERS = ("query", "key", "value", "intermediate.dense")
"""The layers of a BERT encoder whose input is the residual stream. The others, ``output.dense``, write it."""


class SharedPartitionRunner(ClassificationRunner):
    """Shares the residual stream's blocks between the layers, if the entry's method says so."""

    def _adapted(self, config: RunConfig) -> tuple[Any, PreTrainedTokenizerBase]:
        model, tokenizer = super()._adapted(config)
        if config.method in (RANDOM, SPECTRAL):
            share_partition(model, config.method)
        return model, tokenizer


@torch.no_grad()
def share_partition(model: PeftModel, method: str) -> None:
    layers = list(_layers(model))
    if method == RANDOM:
        base: Any = model.get_base_model()
        scores = torch.rand(base.config.hidden_size)
    else:
        scores = gram_scores(torch.stack([_products(layer.pristine_weight(), reads) for layer, reads in layers]).sum(0))
    for layer, reads in layers:
        _cut(layer, model.active_adapter, scores, reads)


def _layers(model: PeftModel) -> Iterator[tuple[SmoaLayer, bool]]:
    """Each adapted layer, and whether it reads the residual stream, or writes it."""
    for path, layer in adapted_layers(model.get_base_model()):
        yield layer, path.endswith(READERS)


def _products(weight: Tensor, reads: bool) -> Tensor:
    """The residual coordinates' products with each other, of trace 1, so that every layer counts the same."""
    gram = weight.T @ weight if reads else weight @ weight.T
    return gram / gram.trace()


def _cut(layer: SmoaLayer, adapter: str, scores: Tensor, reads: bool) -> None:
    own = layer.blocks(adapter)
    shared = labels_from_scores(scores, own.num_blocks)
    rows, cols = (own.row_labels, shared) if reads else (shared, own.col_labels)
    blocks = Blocks(rows, cols, own.num_blocks)
    anchor = MODULATIONS[layer.modulation[adapter]].anchor(layer.pristine_weight(), blocks)
    layer.smoa_row_labels[adapter].copy_(rows)
    layer.smoa_col_labels[adapter].copy_(cols)
    layer.smoa_block_scale[adapter].copy_(block_scale("block", anchor, blocks))
    layer.refresh_orders()


def add_methods() -> None:
    """Let studies name the two methods."""
    PRESETS.update({name: Method("smoa", {"partition": "contiguous"}) for name in (RANDOM, SPECTRAL)})
