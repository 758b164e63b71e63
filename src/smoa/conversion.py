r"""Approximates a SMoA adapter by a LoRA of chosen rank, for servers that load only LoRA.

The best LoRA of rank k keeps the k largest singular values of ΔW (Eckart and Young, 1936):

    ‖ΔW − BA‖ / ‖ΔW‖ = √(Σ_{j>k} σ_j² / Σ_j σ_j²)

ΔW is zero off its diagonal blocks. So its singular values are those of the K blocks together, and each singular vector
is non-zero on one block only. K decompositions of (m/K)×(n/K) replace one of m×n, exactly, at 1/K² of the cost. Stored
block by block, the same k vectors are k(m+n)/K numbers; a LoRA must store k(m+n), mostly zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from smoa.atomic import new_files
from smoa.errors import ConfigError, UnsupportedModuleError, first_of
from smoa.files.names import PREFIX, adapter_layers
from smoa.layers.experts import ParamWrapper
from smoa.layers.layer import SmoaLayer
from smoa.maths.spectrum import decomposition_device
from smoa.maths.update import Update


@dataclass(frozen=True)
class RankRule:
    """How many singular values of a layer to keep. Give exactly one of the three.

    Args:
        rank: Keep this many, or all if a layer has fewer. At least 1.
        energy: Keep the fewest whose squares sum to this share of the total, in (0, 1].
        error: Keep the fewest that bring ‖ΔW − BA‖ / ‖ΔW‖ down to this value, in [0, 1).

    Raises:
        ConfigError: none or several are given, or the one given is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"give exactly one of rank, energy and error, found {given or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be a positive integer")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy={self.energy} must be in (0, 1]: the share of Σ σ² that each layer keeps")
        if self.error is not None and not 0 <= self.error < 1:
            raise ConfigError(f"error={self.error} must be in [0, 1): the largest ‖ΔW − BA‖ / ‖ΔW‖ of a layer")

    def choose(self, singular: Tensor) -> int:
        """The rank for these singular values (descending, float), at least 1."""
        if self.rank is not None:
            return min(self.rank, len(singular))
        energy = singular.double().square()
        # Sum from the small end, so that a small allowed error is not lost in rounding.
        left = energy.flip(0).cumsum(0).flip(0)
        allowed = (1 - self.energy if self.energy is not None else (self.error or 0.0) ** 2) * left[0]
        return max(1, int((left > allowed).sum()))


@dataclass(frozen=True)
class BlockSpectra:
    """Singular value decomposition of one layer's ΔW, block by block, in float32 or wider.

    Args:
        shape: (out_features, in_features) of ΔW.
        rows: I_k of each block, int64.
        cols: J_k of each block, int64.
        U: Left singular vectors of each block, (|I_k|, q_k) with q_k = min(|I_k|, |J_k|).
        singular: Singular values of each block, descending, (q_k,).
        Vh: Right singular vectors of each block, (q_k, |J_k|).
    """

    shape: tuple[int, int]
    rows: list[Tensor]
    cols: list[Tensor]
    U: list[Tensor]
    singular: list[Tensor]
    Vh: list[Tensor]

    @classmethod
    def of(cls, update: Update, weight: Tensor) -> BlockSpectra:
        """Decompose the blocks `ΔW[I_k, J_k]` in float32 or wider; `weight` is the pristine W."""
        delta, blocks = update.delta(weight).detach(), update.factors.blocks
        device = decomposition_device(delta)
        rows, cols = ([side(k).to(device) for k in range(blocks.num_blocks)] for side in (blocks.rows, blocks.cols))
        parts = [torch.linalg.svd(block.to(device), full_matrices=False) for block in blocks.of(delta)]
        U, singular, Vh = zip(*parts, strict=True)
        return cls((delta.shape[0], delta.shape[1]), rows, cols, list(U), list(singular), list(Vh))

    @property
    def values(self) -> Tensor:
        """All singular values of ΔW, descending."""
        return torch.cat(self.singular).sort(descending=True).values

    def error(self, rank: int) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖ of the best LoRA of that rank; 0 if ΔW is zero."""
        energy = self.values.double().square()
        return float((energy[rank:].sum() / energy.sum()).sqrt()) if energy.sum() else 0.0

    def kept(self, rank: int) -> list[tuple[int, int]]:
        """(block, index) of the `rank` largest singular values."""
        owners = [(block, index) for block, values in enumerate(self.singular) for index in range(len(values))]
        order = torch.cat(self.singular).argsort(descending=True, stable=True)[:rank]
        return [owners[i] for i in order.tolist()]

    def factors(self, rank: int, width: int) -> tuple[Tensor, Tensor]:
        """A: (width, n) and B: (m, width). BA is the best approximation of ΔW of that rank; the rest is zero."""
        A = self.singular[0].new_zeros(width, self.shape[1])
        B = self.singular[0].new_zeros(self.shape[0], width)
        for slot, (block, index) in enumerate(self.kept(rank)):
            root = self.singular[block][index].sqrt()
            A[slot, self.cols[block]] = root * self.Vh[block][index]
            B[self.rows[block], slot] = root * self.U[block][:, index]
        return A, B

    def converted(self, name: str, rank: int, width: int, halves: int) -> ConvertedLayer:
        """What a LoRA of `width` ranks, of which `rank` are this matrix's, keeps of ΔW."""
        rows, columns = self.shape
        parameters = width * rows + width * columns // halves  # gate and up have one A in common
        blockwise = sum(len(self.rows[block]) + len(self.cols[block]) for block, _ in self.kept(rank))
        norm = float(self.values.double().square().sum().sqrt())
        return ConvertedLayer(name, rows, columns, rank, self.error(rank), norm, parameters, blockwise)


@dataclass(frozen=True)
class ConvertedLayer:
    """What the conversion of one layer kept and lost.

    `error` is ‖ΔW − BA‖ / ‖ΔW‖, and `norm` is ‖ΔW‖. `parameters` counts the numbers in the LoRA's factors, and
    `blockwise_parameters` those that remain if each vector is stored on its block only.
    """

    module: str
    rows: int
    columns: int
    rank: int
    error: float
    norm: float
    parameters: int
    blockwise_parameters: int


@dataclass(frozen=True)
class LoraConversion:
    """A LoRA adapter as PEFT's config and state dict, and what each layer lost."""

    config: LoraConfig
    state: dict[str, Tensor]
    layers: list[ConvertedLayer]

    @property
    def error(self) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖ over all layers together."""
        total = sum(layer.norm**2 for layer in self.layers)
        return (sum((layer.error * layer.norm) ** 2 for layer in self.layers) / total) ** 0.5 if total else 0.0

    @property
    def parameters(self) -> int:
        """Numbers in the LoRA's factors."""
        return sum(layer.parameters for layer in self.layers)

    def save(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` together; PEFT loads them without smoa."""
        with new_files(Path(folder)) as temporary:
            self.config.save_pretrained(str(temporary))
            form = torch.contiguous_format  # tied tables share their memory, which safetensors refuses
            tensors = {name: tensor.clone(memory_format=form) for name, tensor in self.state.items()}
            save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME)


class UpdateSpectra:
    """The singular values and vectors of an adapter's layers, from which `to_lora` builds a LoRA of any rank.

    Raises:
        ConfigError: the model has no SMoA adapter of that name.
        UnsupportedModuleError: the adapter has a convolution with groups.
    """

    @torch.no_grad()
    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        tuner: Any = model.base_model
        layers = adapter_layers(tuner.model, adapter_name)
        if not layers:
            kinds = {name: getattr(config.peft_type, "value", None) for name, config in model.peft_config.items()}
            raise ConfigError(f"the model has no SMoA adapter named {adapter_name!r}; it has {kinds}")
        self.config: Any = model.peft_config[adapter_name]
        self.conv1d = any(layer.fan_in_fan_out for layer in layers.values())
        grouped = [name for name, layer in layers.items() if getattr(layer.get_base_layer(), "groups", 1) != 1]
        if grouped:
            raise UnsupportedModuleError(
                f"{first_of(grouped)}: LoRA can't hold the update of a convolution with groups, since its factors mix "
                "the channels of all groups; merge the adapter instead"
            )
        state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
        # Trained tensors that are not factors: biases, modules_to_save, token embeddings
        self.other_tensors = {name: tensor for name, tensor in state.items() if ".smoa_" not in name}
        self.layers: dict[str, BlockSpectra] = {}
        self.adapted = layers
        self.keys: dict[str, str] = {}  # what a config calls each adapted layer or parameter
        self.experts: dict[str, list[list[str]]] = {}  # the matrices of each expert; a layer has one of one matrix
        for name, layer in layers.items():
            parts = {part: BlockSpectra.of(update, weight) for part, weight, update in layer.parts(adapter_name)}
            module, halves = name, 1
            self.keys[name] = name
            if isinstance(layer, ParamWrapper):
                module, halves = name.replace(".base_layer", ""), layer.layout.halves
                self.keys[name] = f"{module}.{layer.parameter_name}"
            named = {f"{module}.{part}" if part else name: spectrum for part, spectrum in parts.items()}
            self.layers |= named
            matrices = list(named)
            self.experts[name] = [matrices[start : start + halves] for start in range(0, len(matrices), halves)]

    def to_lora(self, rule: RankRule, uniform_rank: bool = False) -> LoraConversion:
        """Build the LoRA that keeps as much of every layer as `rule` says.

        Args:
            rule: How many singular values to keep of each layer.
            uniform_rank: Pad all layers with zeros to the largest rank, for servers that support only one rank.
        """
        ranks = {name: rule.choose(spectrum.values) for name, spectrum in self.layers.items()}
        # A LoRA's rank is that of the expert that needs most, all its matrices together
        widths = {n: max(sum(ranks[m] for m in expert) for expert in experts) for n, experts in self.experts.items()}
        largest = max(widths.values())
        widths = dict.fromkeys(widths, largest) if uniform_rank else widths
        state, converted = dict(self.other_tensors), list[ConvertedLayer]()
        for name, experts in self.experts.items():
            width, layer = widths[name], self.adapted[name]
            pairs = [self._factors(layer, expert, ranks, width) for expert in experts]
            state |= {f"{PREFIX}{name}.{part}": factor for part, factor in _in_pefts_names(layer, pairs).items()}
            converted += [
                self.layers[matrix].converted(matrix, ranks[matrix], width, halves=len(expert))
                for expert in experts
                for matrix in expert
            ]
        # alpha = r in every layer. The factors include the scale, so a server that reads one r gets it right too.
        exceptions = {self.keys[name]: width for name, width in widths.items() if width != largest}
        parameters = [self.keys[name] for name, layer in self.adapted.items() if isinstance(layer, ParamWrapper)]
        config = LoraConfig(
            r=largest,
            lora_alpha=largest,
            rank_pattern=exceptions,
            alpha_pattern=dict(exceptions),
            target_modules=[key for key in self.keys.values() if key not in parameters],
            target_parameters=parameters or None,
            bias="lora_only" if self.config.bias == "smoa_only" else self.config.bias,
            modules_to_save=self.config.modules_to_save,
            trainable_token_indices=self.config.trainable_token_indices,
            fan_in_fan_out=self.conv1d,
            task_type=self.config.task_type,
            base_model_name_or_path=self.config.base_model_name_or_path,
            revision=self.config.revision,
            inference_mode=True,
        )
        return LoraConversion(config, state, converted)

    def _factors(
        self, layer: SmoaLayer, matrices: list[str], ranks: Mapping[str, int], width: int
    ) -> tuple[Tensor, Tensor]:
        """A: (width, n) and B: (m, width) of a layer, or of one expert, each of whose matrices has ranks of its own."""
        if not isinstance(layer, ParamWrapper) or len(matrices) == 1:
            return self.layers[matrices[0]].factors(ranks[matrices[0]], width)
        pairs = [self.layers[matrix].factors(ranks[matrix], ranks[matrix]) for matrix in matrices]
        A = torch.cat([pair[0] for pair in pairs])
        B, start = A.new_zeros(width, len(matrices), layer.layout.out_features), 0
        for half, (_, part) in enumerate(pairs):
            B[start : start + part.shape[1], half] = part.T
            start += part.shape[1]
        return torch.cat([A, A.new_zeros(width - start, A.shape[1])]), layer.layout.join(B).T


def _in_pefts_names(layer: SmoaLayer, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """LoRA's factors of a layer or of all experts, in the names and shapes that PEFT gives them there."""
    base, (A, B) = layer.get_base_layer(), pairs[0]
    if isinstance(layer, ParamWrapper):
        # If PEFT doesn't know that a parameter is transposed, it exchanges inputs and outputs
        if len(pairs) > 1 and bool(getattr(base, "is_transposed", False)) != layer.layout.transposed:
            pairs = [(B.T, A.T) for A, B in pairs]
        if len(pairs) > 1:
            A, B = torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], dim=-1).flatten(1)
    elif isinstance(base, nn.Embedding):  # PEFT's ΔW is the table transposed
        return {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        A, B = A.view(len(A), base.in_channels, *base.kernel_size), B.view(*B.shape, *(1 for _ in base.kernel_size))
    return {"lora_A.weight": A, "lora_B.weight": B}


def convert_to_lora(
    model: PeftModel,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    adapter_name: str = "default",
    uniform_rank: bool = False,
) -> LoraConversion:
    """Approximate a SMoA adapter by the best LoRA, layer by layer. Give exactly one of `rank`, `energy` and `error`.

    Args:
        model: Model with the adapter.
        rank: Rank of every layer.
        energy: Smallest share of Σ σ² that each layer keeps.
        error: Largest ‖ΔW − BA‖ / ‖ΔW‖ of each layer.
        adapter_name: The adapter to convert.
        uniform_rank: Pad all layers with zeros to the largest rank, for servers that support only one rank.

    Raises:
        ConfigError: none or several of the three are given, one is out of range, or there is no such adapter.
        UnsupportedModuleError: the adapter has a convolution with groups.
    """
    return UpdateSpectra(model, adapter_name).to_lora(RankRule(rank, energy, error), uniform_rank)
