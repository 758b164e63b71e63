"""SMoA on an embedding: the table is W, a row for each token and a column for each feature.

A lookup adds the tokens' rows of ΔW, and forms no other. Tables are as tall as the vocabulary, so nothing of a table's
size is made in a training step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from smoa.config import Shape
from smoa.layers.layer import SmoaLayer
from smoa.maths.factors import Initialization


class Embedding(SmoaLayer):
    """SMoA on a `torch.nn.Embedding`, or on a scaled one of transformers (`embed_scale`).

    Dropout acts on the input as in other layers, where a token is a one-hot vector: it drops tokens, not features.
    `padding_idx` and `scale_grad_by_freq` act on the factors as they would on the table. With `sparse`, the factors'
    gradients are dense.
    """

    converted_by_peft = False
    read_by_models = ("num_embeddings", "embedding_dim", "padding_idx")

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(num_embeddings, embedding_dim)."""
        return int(base.num_embeddings), int(base.embedding_dim)  # type: ignore[arg-type]

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Refuse tables that change while they are used."""
        if base.max_norm is not None:
            return (
                f"max_norm={base.max_norm} changes the table in every lookup, and ΔW is relative to it; set it to None"
            )
        return None

    def _fill_factors(self, A: Tensor, B: Tensor, adapter_name: str, init: Initialization) -> None:
        super()._fill_factors(A, B, adapter_name, init)
        if init is True:  # variance K instead of K / 3n: LoRA's is 1 here, and a token uses n / K of the n columns
            A.mul_((3 * self.in_features) ** 0.5)

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`ΔW[x]` (…, embedding_dim) for int x, times `embed_scale` if the base layer has one."""
        self.gather(adapter_name)
        base: Any = self.get_base_layer()
        tokens = x.reshape(-1)
        update, weight = self.update(adapter_name), self.pristine_weight()
        rows = update.lookup(tokens, weight, base.padding_idx, base.scale_grad_by_freq)
        rows = rows * self.smoa_dropout[adapter_name](rows.new_ones(tokens.shape[0], 1))
        scale: Any = getattr(base, "embed_scale", 1.0)
        scale = scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale
        output: Tensor = rows * scale
        return output.view(*x.shape, self.in_features)
