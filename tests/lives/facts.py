"""What each adapter is, kept apart from the model in plain tensors, and what the model computes by the formulas."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from tests import oracle

PREFIX = "base_model.model."
PARTS = ("smoa_A.weight", "smoa_B.weight", "smoa_row_labels", "smoa_col_labels", "smoa_block_scale")


@dataclass(frozen=True, repr=False, eq=False)
class Facts:
    """An adapter: its config, and the tensors of each layer by its name in a file; `copies` are modules_to_save."""

    config: dict[str, Any]
    layers: dict[str, dict[str, Tensor]]
    copies: dict[str, Tensor] = field(default_factory=dict)

    @property
    def has_dropout(self) -> bool:
        return bool(self.config.get("smoa_dropout"))


def plain(key: str) -> str:
    """A name without what wraps a module."""
    parts = [part for part in key.split(".") if part not in ("base_layer", "_orig_mod", "original_module")]
    return ".".join(parts).removeprefix(PREFIX)


def read(model: Any, name: str, config: dict[str, Any]) -> Facts:
    """The tensors that a model has for an adapter, by the exact names in its state dict."""
    state, layers, copies = model.state_dict(), {}, {}
    for path, module in model.named_modules():
        if name in getattr(module, "smoa_A", {}):
            own = {}
            for part in PARTS:
                head, dot, tail = part.partition(".")
                own[part] = state[f"{path}.{head}.{name}{dot}{tail}"].detach().clone()
            parameter = getattr(module, "parameter_name", None)
            layers[plain(path) + (f".{parameter}" if parameter else "")] = own
        if name in (getattr(module, "modules_to_save", None) or {}):
            copies[plain(path) + ".weight"] = state[f"{path}.modules_to_save.{name}.weight"].detach().clone()
    return Facts(config, layers, copies)


def parameters(model: Any) -> dict[str, str]:
    """The names of adapted parameters, by the names that their wrappers have in a file: of one module, nested."""
    found = {path: getattr(module, "parameter_name", None) for path, module in model.named_modules()}
    return {path.removeprefix(PREFIX): f"{plain(path)}.{name}" for path, name in found.items() if name}


def of_file(
    folder: str, config: dict[str, Any], copied: Iterable[str] = (), known: Mapping[str, str] | None = None
) -> tuple[Facts, dict[str, Tensor]]:
    """The adapter in a folder, and what else its file has, by the base's names; `known` are those of parameters."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    layers: dict[str, dict[str, Tensor]] = {}
    copies, rest = {}, {}
    for key, tensor in tensors.items():
        part = next((part for part in PARTS if key.endswith(f".{part}")), None)
        if part is not None:
            layer = key.removeprefix(PREFIX).removesuffix(f".{part}")
            layers.setdefault((known or {}).get(layer, layer), {})[part] = tensor
        elif plain(key) in copied:
            copies[plain(key)] = tensor
        else:
            rest[plain(key)] = tensor
    return Facts(config, layers, copies), rest


def ranks_and_scaling(config: Mapping[str, Any], num_blocks: int) -> tuple[list[int], float]:
    r = int(config["r"])
    return oracle.block_ranks(r, num_blocks), float(config.get("alpha") or r) / r


def delta(kind: str, weight: Tensor, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """ΔW in the shape in which the model stores a weight; `kind` is "conv1d" for a transposed one."""
    A, B, rows, cols, scale = (own[part] for part in PARTS)
    ranks, scaling = ranks_and_scaling(config, scale.shape[-1])
    modulation = config.get("modulation", "hadamard")
    if rows.dim() == 1:
        matrix = weight.T if kind == "conv1d" else weight.flatten(1)
        scales = [scaling * float(each) for each in scale]
        found = oracle.delta_weight(
            matrix, A.double(), B.double(), rows.tolist(), cols.tolist(), ranks, scales, modulation
        )
        return found.T if kind == "conv1d" else found.view(weight.shape)
    stack = weight if weight.dim() == 3 else weight[None]
    matrices = stack.unflatten(-2, (len(rows) // len(stack), -1)).flatten(0, 1)
    r, parts = sum(ranks), []
    for g, matrix in enumerate(matrices):
        scales = [scaling * float(each) for each in scale[g % len(scale)]]
        of_g = A[g * r : (g + 1) * r].double(), B[:, g * r : (g + 1) * r].double()
        parts.append(
            oracle.delta_weight(
                matrix, *of_g, rows[g % len(rows)].tolist(), cols[g % len(cols)].tolist(), ranks, scales, modulation
            )
        )
    return torch.stack(parts).view(weight.shape)


class Oracle:
    """A base in float64 and adapters: outputs and gradients by the formulas.

    `state` are the base's bits, by name, in its own dtype. They change only where an adapter trains biases.
    """

    def __init__(self, pure: Any, bits: dict[str, Tensor]) -> None:
        self.pure, self.state = pure, bits
        self.adapters: dict[str, Facts] = {}
        self._deltas: dict[tuple[int, str], Tensor] = {}
        self._kept: list[Any] = []

    def base(self) -> dict[str, Tensor]:
        return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in self.state.items()}

    def parameter(self, layer: str) -> str:
        names = layer, f"{layer}.weight", f"{layer}.base_layer.weight"
        return next(name for name in names if name in self.state)

    def kind(self, layer: str) -> str:
        module = dict(self.pure.named_modules()).get(layer.removesuffix(".weight"))
        return "conv1d" if type(module).__name__ == "Conv1D" else ""

    def delta(self, facts: Facts, layer: str) -> Tensor:
        own, name = facts.layers[layer], self.parameter(layer)
        if any(tensor.requires_grad for tensor in own.values()):
            return delta(self.kind(layer), self.state[name].double(), own, facts.config)
        key = id(facts), layer
        if key not in self._deltas:
            self._deltas[key] = delta(self.kind(layer), self.state[name].double(), own, facts.config)
            self._kept.append(facts)  # its id stays its own
        return self._deltas[key]

    def weights(
        self, active: Iterable[Facts], copied: Facts | None = None, merged: Iterable[Facts] = ()
    ) -> dict[str, Tensor]:
        """A layer that something is merged into computes with that, any other with what is active."""
        found, with_merged = self.base(), {layer for facts in merged for layer in facts.layers}
        pairs = [(facts, layer) for facts in merged for layer in facts.layers]
        pairs += [(facts, layer) for facts in active for layer in facts.layers if layer not in with_merged]
        for facts, layer in pairs:
            name = self.parameter(layer)
            found[name] = found[name] + self.delta(facts, layer)
        for name, tensor in ({} if copied is None else copied.copies).items():
            found[name] = tensor.double()
        return found

    def output(
        self, ids: Tensor, active: Iterable[Facts], copied: Facts | None = None, merged: Iterable[Facts] = ()
    ) -> Tensor:
        out = functional_call(self.pure, self.weights(active, copied, merged), (ids,), strict=False)
        return getattr(out, "logits", out)

    def gradients(
        self, ids: Tensor, of_rows: list[list[Facts]], cotangent: Tensor
    ) -> dict[tuple[int, str, str], Tensor]:
        """The gradients of Σ output · cotangent by adapter (its id), layer and part, each row with its own adapters."""
        leaves: dict[int, Facts] = {}
        for facts in (each for row in of_rows for each in row):
            if id(facts) not in leaves:
                grown = {
                    layer: {
                        part: tensor.detach().double().requires_grad_() if part in PARTS[:2] else tensor
                        for part, tensor in own.items()
                    }
                    for layer, own in facts.layers.items()
                }
                copies = {name: tensor.detach().double().requires_grad_() for name, tensor in facts.copies.items()}
                leaves[id(facts)] = replace(facts, layers=grown, copies=copies)
        total = torch.zeros((), dtype=torch.float64)
        for group in {tuple(map(id, row)) for row in of_rows}:
            rows = [i for i, row in enumerate(of_rows) if tuple(map(id, row)) == group]
            own = [leaves[each] for each in group]
            copied = next((each for each in own if each.copies), None)
            total = total + (self.output(ids[rows], own, copied) * cotangent[rows]).sum()
        total.backward()
        return {
            (number, layer, part): tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
            for number, facts in leaves.items()
            for layer, own in facts.layers.items()
            for part, tensor in own.items()
            if tensor.requires_grad
        }
