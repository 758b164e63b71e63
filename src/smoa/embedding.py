"""SMoA on an embedding: a lookup adds the tokens' rows of ΔW, and forms no other.

Tables are as tall as the vocabulary, so a training step makes nothing of a table's size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from smoa.config import Shape
from smoa.distributed import gather
from smoa.kernels import formed
from smoa.kernels.autograd import recomputed
from smoa.kernels.factors import Initialization
from smoa.layer import SmoaLayer, of_base
from smoa.route import Route, is_instrumented


class Embedding(SmoaLayer):
    """SMoA on a `torch.nn.Embedding`, whose table is W, or on a scaled one of transformers (`embed_scale`).

    Dropout drops tokens, not features: the input is a one-hot vector. `padding_idx` and `scale_grad_by_freq` act on the
    factors as they would on the table. With `sparse`, the factors' gradients are dense.
    """

    num_embeddings, embedding_dim, padding_idx = map(of_base, ("num_embeddings", "embedding_dim", "padding_idx"))

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(num_embeddings, embedding_dim)."""
        return int(base.num_embeddings), int(base.embedding_dim)  # type: ignore[arg-type]

    def _fill_factors(self, A: Tensor, B: Tensor, adapter_name: str, init: Initialization) -> None:
        super()._fill_factors(A, B, adapter_name, init)
        if init is True:  # variance K instead of K / 3n: LoRA's is 1 here, and a token uses n / K of the n columns
            A.mul_((3 * self.in_features) ** 0.5)

    def fits_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """If there is M, and the base layer's call does nothing but look up, and perhaps scale."""
        base: Any = self.base_layer
        is_known = type(base) is nn.Embedding or type(base).__name__.endswith("ScaledWordEmbedding")
        looks_up = is_known and base._parameters.keys() == {"weight"} and not is_instrumented(base)
        return looks_up and self.adapters[adapter_name].modulation != "none"

    def in_one_product(self, x: Tensor, adapter_name: str) -> Tensor:
        """`(W + ΔW)[x]`, as below."""
        return self._scaled(self._rows(x, adapter_name, True), x)

    def branch_output(self, x: Tensor, adapter_name: str, route: Route | None = None) -> Tensor:
        """`ΔW[x]` (…, embedding_dim) for int x, times `embed_scale` if the base layer has one."""
        rows = self._rows(x, adapter_name)
        rows = rows * self.smoa_dropout[adapter_name](rows.new_ones(rows.shape[0], 1))
        return self._scaled(rows, x)

    def _rows(self, x: Tensor, adapter_name: str, adds_weight: bool = False) -> Tensor:
        gather(self, adapter_name)
        base: Any = self.get_base_layer()
        route = formed.Lookup(adds_weight, base.padding_idx, base.scale_grad_by_freq)
        return recomputed(route, self.update(adapter_name), x.reshape(-1), self.pristine_weight())

    def _scaled(self, rows: Tensor, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        scale: Any = getattr(base, "embed_scale", 1.0)
        scale = scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale
        output: Tensor = rows * scale
        return output.view(*x.shape, self.in_features)
