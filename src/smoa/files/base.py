"""Whether the base under an adapter is the one that it was trained on.

ΔW is a product with W, so on another base it means nothing. The saved block scales are a checksum: each is the inverse
of the rms of a block of W. Of each kind of target (names alike but for numbers) a layer in each third of the model is
compared, and all layers if one is off. It can't tell bases whose blocks have the same rms (docs/limits.md).
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, first_of
from smoa.layers.layer import SmoaLayer
from smoa.layers.merging import weight_id
from smoa.maths.blocks import Blocks
from smoa.maths.scale import DEFAULT_SCALE, FACTOR, ScaleKind, block_scale

SURE, WRONG, WRONG_QUANTIZED = 0.01, 0.05, 0.25
"""By how much an rms is off where a warning comes always, and where loading is refused; quantizing changes it too."""
NOISE = 0.02
"""Divided by √(entries of a block): from here on bases of two names differ by more than rounding."""

log = logging.getLogger("smoa")
_SCALES: MutableMapping[Tensor, tuple[Any, dict[Any, Tensor]]] = WeakIdKeyDictionary()
"""The block scales of weights by their labels, so that another adapter of the same kind costs K comparisons."""
SAMPLED = 64
"""Entries of each side of a weight by which it is known again: PyTorch counts no writes through `.data`."""


class Held(NamedTuple):
    """A layer as a file has it, and its weight here.

    Args:
        name: Of the layer.
        labels: Of rows, uint8 (m,), and of columns, uint8 (n,).
        scale: Block scales, float (K,).
        weight: Gives the pristine W (m, n).
        known: Block scales of W that were computed before, by labels and kind.
        is_quantized: Whether W is.
    """

    name: str
    labels: tuple[Tensor, Tensor]
    scale: Tensor
    weight: Callable[[], Tensor]
    known: dict[Any, Tensor]
    is_quantized: bool = False

    def off(self, kind: ScaleKind) -> float:
        """The largest relative difference between the rms of a block here and in the file."""
        key = kind, *(side.cpu().numpy().tobytes() for side in self.labels)
        if key not in self.known:
            W = self.weight()
            rows, cols = (side.to(W.device) for side in self.labels)
            scale = block_scale(kind, W, Blocks(rows, cols, len(self.scale)))
            smallest = torch.finfo(W.dtype).smallest_normal  # below it a dtype rounds an rms away
            self.known[key] = scale.masked_fill((scale == 1) | (FACTOR / scale < smallest), math.nan)
        known = self.known[key]
        off = (self.scale.cpu().float() / known - 1).abs()[~known.isnan()]
        return float(off.max()) if len(off) else 0.0

    @property
    def noise(self) -> float:
        """What rounding makes of an rms, at most."""
        m, n = map(len, self.labels)
        return NOISE * len(self.scale) / math.sqrt(m * n)


@contextmanager
def taking_over(old: SmoaConfig, new: SmoaConfig, places: Iterable[tuple[Any, str]]) -> Iterator[None]:
    """Let the config of a loaded adapter say of its base and scales what that of the file says which replaces its
    tensors in the context; an error, or Ctrl-C, takes both back. `places` are the tensors, as `places_loaded` gives
    them."""
    names = "scale", "other_base", "quantized_base", "base_model_name_or_path"
    before = {name: getattr(old, name) for name in names}
    held = [(table, key, table[key], table[key].detach().clone()) for table, key in places]
    try:
        vars(old).update({name: getattr(new, name) for name in names})
        yield
    except BaseException:
        vars(old).update(before)
        with torch.no_grad():
            for table, key, tensor, own in held:
                is_there = table[key] is tensor
                table[key] = tensor  # `low_cpu_mem_usage` has put another in its place
                if is_there:
                    tensor.copy_(own)
        raise


def check_base(layers: Iterable[Held], config: SmoaConfig, base_name: str | None) -> None:
    """Warn if a base differs from the adapter's, and raise AdapterFileError if it is another one.

    Args:
        layers: Those of the adapter, in the model's order.
        config: The saved one.
        base_name: Of the model here.
    """
    kind, named = config.scale or DEFAULT_SCALE, config.base_model_name_or_path
    if config.modulation == "none" or kind == "paper" or config.other_base:
        return
    kinds = dict[str, list[Held]]()
    for each in layers:
        kinds.setdefault(re.sub(r"\d+", "*", each.name), []).append(each)
    chosen = [own[i] for own in kinds.values() for i in sorted({len(own) * sixth // 6 for sixth in (1, 3, 5)})]
    off = {each.name: (each.off(kind), each) for each in chosen}
    if any(not value <= SURE for value, _ in off.values()):
        off = {each.name: (each.off(kind), each) for own in kinds.values() for each in own}
    is_other = bool(named and base_name and named != base_name)
    wrong, strange, plain = list[str](), list[str](), 0.0
    for name, (value, each) in off.items():
        is_quantized = each.is_quantized or config.quantized_base
        if not value <= (WRONG_QUANTIZED if is_quantized else WRONG):
            wrong.append(name)
        elif not is_quantized and value > (min(SURE, each.noise) if is_other else SURE):
            strange.append(name)
            plain = max(plain, value)
    here, size = f" (this is {base_name})" if base_name else "", "the size (rms) of blocks of"
    if wrong:
        raise AdapterFileError(
            f"the adapter was trained on another base{f', {named}' if named else ''}{here}: "
            f"{size} {first_of(wrong)} is off by up to {max(off[name][0] for name in wrong):.0%}; load that base, or "
            "set other_base=True in the adapter's config to load it all the same"
        )
    if strange:
        warnings.warn(
            f"the adapter was trained on {named or 'a base'}, and this base{here} is not quite the same: "
            f"{size} {first_of(strange)} is off by up to {plain:.2%}",
            stacklevel=2,
        )


def _sample_of(weight: Tensor) -> str:
    """A digest of some entries of a weight, spread over it; nothing of a quantized one that is no plain tensor, which
    nobody writes to."""
    if type(weight) is not Tensor:
        return ""
    sample = weight[tuple(slice(None, None, max(1, side // SAMPLED)) for side in weight.shape)]
    return sha256(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def held_layers(
    layers: dict[str, SmoaLayer], tensors: Callable[[str], tuple[Tensor, ...]], tables: list[tuple[Any, Tensor]]
) -> list[Held]:
    """The layers of a model, given what the file has of each (`PARTS`), and the tables of embeddings that come along;
    of experts the first matrix."""
    tables_of = {weight_id(getattr(module, "base_layer", module).weight): table for module, table in tables}
    found, left_out = list[Held](), list[str]()
    for name, layer in layers.items():
        A, B, *partition = tensors(name)
        rows, cols, scale = (part.view(-1, part.shape[-1])[0] for part in partition)
        stored = layer.stored_weight()
        is_cut = hasattr(layer.get_base_layer(), "_hf_tp_plan")
        if stored.is_meta or isinstance(stored, DTensor) or hasattr(stored, "ds_id") or is_cut:
            left_out.append(name)
        elif A.any() and B.any():  # or ΔW is zero on any base
            table = tables_of.get(weight_id(stored))
            read = partial(layer.pristine_matrix, 0) if table is None else partial(torch.Tensor.detach, table)
            state = weight_id(stored), _sample_of(stored.data)
            if stored not in _SCALES or _SCALES[stored][0] != state:
                _SCALES[stored] = state, {}
            known = _SCALES[stored][1] if table is None else {}
            is_quantized = layer.quantization_backend is not None
            found.append(Held(name, (rows, cols), scale, read, known, is_quantized))
    if left_out:
        log.info("%s: not whole in memory, so not compared with the adapter's base", first_of(left_out))
    return found
