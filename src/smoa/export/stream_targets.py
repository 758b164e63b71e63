"""Finds the tensors of a checkpoint that hold adapted weights: of a layer, of all experts, or of one expert."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from smoa.errors import UnsupportedModuleError
from smoa.export.shards import Checkpoint
from smoa.layers.kinds import kind_of
from smoa.layers.layout import HALVED, Layout

SEPARATE = {
    HALVED: (("gate_proj.weight", "up_proj.weight"), ("w1.weight", "w3.weight")),
    "down_proj": (("down_proj.weight",), ("w2.weight",)),
}
"""Names that checkpoints give to the matrices of one expert, which transformers joins while it loads."""
FOLDERS = (".mlp.", ".block_sparse_moe.")
"""Names of the module that holds the experts: transformers' own, and Mixtral's in checkpoints."""


@dataclass(frozen=True)
class StreamTarget:
    """What one tensor of a checkpoint holds.

    Args:
        name: Name of the adapted layer or parameter.
        transposed: The tensor is a layer's weight stored as (in_features, out_features).
        layout: How a parameter holds the matrices of experts; None for a layer.
        number: The matrix that the tensor is, if it is one of a parameter's.
    """

    name: str
    transposed: bool = False
    layout: Layout | None = None
    number: int | None = None

    @property
    def label(self) -> str:
        """The name, and the number of the matrix, if it is one of several."""
        return self.name if self.number is None else f"{self.name}[{self.number}]"


def target_of(name: str, model: nn.Module) -> StreamTarget | None:
    """The target of an adapted layer or parameter; None if the model does not have it.

    Raises:
        UnsupportedModuleError: the layer can't be adapted, although older versions did so.
    """
    module_name, _, parameter = name.rpartition(".")
    modules = dict(model.named_modules())
    if name in modules:
        kind = kind_of(modules[name])
        if kind is not None and (refusal := kind.refusal(modules[name])) is not None:
            raise UnsupportedModuleError(f"{name}: {refusal}; train an adapter without this layer")
        return StreamTarget(name, kind is not None and kind.fan_in_fan_out)
    if hasattr(modules.get(module_name), parameter):
        return StreamTarget(name, layout=Layout.of(modules[module_name], parameter))
    return None


def separate_experts(
    target: StreamTarget, prefixes: Collection[str], checkpoint: Checkpoint
) -> dict[str, StreamTarget]:
    """The tensors of each expert's matrices by their keys, if the checkpoint has all of them; else none.

    Args:
        target: A parameter of experts.
        prefixes: What may stand before the parameter's name in the checkpoint's keys.
        checkpoint: The base model's files.
    """
    layout, (module, _, parameter) = target.layout, target.name.rpartition(".")
    if layout is None:
        return {}
    for prefix in prefixes:
        for folder in FOLDERS:
            place = (prefix + module).replace(FOLDERS[0], folder)
            for names in SEPARATE.get(parameter, ()):
                keys = [f"{place}.{expert}.{name}" for expert in range(layout.experts) for name in names]
                entries = [checkpoint.entries.get(key) for key in keys]
                if all(entry is not None and entry.shape == layout.shape for entry in entries):
                    numbered = enumerate(keys)
                    return {key: StreamTarget(target.name, layout=layout, number=number) for number, key in numbered}
    return {}
