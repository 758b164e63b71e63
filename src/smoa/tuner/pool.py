"""Thousands of adapters over one base: stacked factors, one product for the rows of all of them, no module for each."""

from __future__ import annotations

import copy
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from smoa.atomic import new_files
from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, ConfigError, MergeError, UnsupportedModuleError, nearest
from smoa.files.checks import check_parts
from smoa.files.loading import read_adapter
from smoa.files.names import PARTS, PREFIX, with_id, without_id
from smoa.layers.layer import SmoaLayer, as_matrix, in_autocast_dtype
from smoa.layers.linear import Linear
from smoa.layers.quantized import dequantized, find_backend
from smoa.layers.weight_cache import tensor_state
from smoa.maths.blocks import Blocks
from smoa.maths.factors import BlockRun, Factors, factor_shapes, init_factors
from smoa.maths.kernels.shared import Gathered, StackedFactors, diagonal_of, shared
from smoa.maths.scale import MODULATIONS, ModulationKind, rank_scale
from smoa.tuner.generation import BASE

ALIKE = 0.5
"""Share of coordinates in the same block above which two spectral adapters may be of one base, quantized or not."""


class AdapterPool:
    """Adapters of one base model that are used together, each row of a batch with its own.

        pool = AdapterPool(base, folder="adapters")
        with pool.use(["anna", "ben", "__base__"]):
            base.generate(**inputs)

    A layer's factors of all adapters with the same blocks and ranks are one tensor, so that a batch takes one product
    for each such group, however many adapters are in it (`smoa.maths.kernels.shared`). Loading is safe while batches
    run. Linear layers and Conv1D are supported, quantized or not; an adapter with anything else in its file (biases,
    modules_to_save, token embeddings) is refused by name.

    Args:
        base: The model. Its weights are not changed, and it computes as ever outside `use`.
        slots: The most adapters that are held; None for any number. Beyond it the least recently used one leaves.
        folder: Where adapters lie, each in a folder of its name, to be read when `use` asks for them.
        dtype: Of the factors; by default that of the first adapter's.

    Raises:
        MergeError: adapters are merged into the base.
        UnsupportedModuleError: the base's weights are sharded, offloaded, or wrapped by PEFT.
    """

    def __init__(
        self,
        base: nn.Module,
        slots: int | None = None,
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if any(isinstance(module, SmoaLayer) and module.merged for module in base.modules()):
            raise MergeError("AdapterPool: adapters are merged into the base; call unmerge_adapter first")
        if isinstance(base, PeftModel) or any(isinstance(module, SmoaLayer) for module in base.modules()):
            raise UnsupportedModuleError("AdapterPool: takes a base model without PEFT; call model.unload() first")
        for name, parameter in base.named_parameters():
            if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or parameter.is_meta:
                raise UnsupportedModuleError(f"AdapterPool: {name} is sharded or offloaded; load the base whole")
        if slots is not None and slots < 1:
            raise ConfigError(f"AdapterPool: slots={slots} must be at least 1, or None")
        self.base, self.slots, self.dtype = base, slots, dtype
        self.folder = None if folder is None else Path(folder)
        self._members: OrderedDict[str, Member] = OrderedDict()
        self._shelves: dict[Any, Shelf] = {}
        self._in_use: Counter[str] = Counter()
        self._templates: dict[str, tuple[SmoaConfig, dict[str, Tensor]]] = {}
        self._hooked: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._trained: Batch | None = None

    # Which adapters there are.

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded, the most recently used last."""
        return list(self._members)

    def load(self, name: str, source: str | Path) -> None:
        """Read a saved adapter, in the place of one of the same name.

        Raises:
            AdapterFileError: it is damaged, or was made for another base.
            ConfigError: its file has more than factors, or the name is taken by one that is in use.
        """
        config = SmoaConfig.from_pretrained(str(source))
        if not isinstance(config, SmoaConfig):
            raise ConfigError(f"{source}: is no SMoA adapter but {getattr(config, 'peft_type', 'none')}")
        self._put(name, config, read_adapter(source), str(source))

    def add(self, name: str, config: SmoaConfig) -> None:
        """Add a new adapter, as `get_peft_model(base, config)` makes one.

        Raises:
            ConfigError: the name is taken, or the config trains more than factors.
        """
        if name in self._members:
            raise ConfigError(f"AdapterPool.add: {name!r} is there already; unload it, or choose another name")
        settings = json.dumps(config.to_dict(), default=sorted, sort_keys=True)
        if settings not in self._templates:
            own = copy.deepcopy(config)
            model = get_peft_model(self.base, own)
            try:
                self._templates[settings] = own, without_id(get_peft_model_state_dict(model))
            finally:
                model.unload()
        filled, tensors = self._templates[settings]
        self._put(name, copy.deepcopy(filled), tensors, name, fresh=True)

    def unload(self, name: str) -> None:
        """Forget an adapter; its slot is free.

        Raises:
            ConfigError: there is none of this name, or a batch uses it.
        """
        with self._lock:
            if name not in self._members:
                raise ConfigError(f"AdapterPool.unload: no adapter {name!r}{nearest(name, self._members)}")
            if self._in_use[name]:
                raise ConfigError(f"AdapterPool.unload: {name!r} is in use; wait for the batch to end")
            member = self._members.pop(name)
            member.shelf.free.append(member.slot)

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as an ordinary PEFT folder, whole or not at all."""
        member = self._member(name)
        tensors = {f"{PREFIX}{path}.{part}": t for path, parts in self._parts(member).items() for part, t in parts}
        with new_files(Path(folder)) as temporary:
            save_file(with_id(tensors, member.config), temporary / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
            member.config.save_pretrained(temporary)

    def parameters(self) -> list[nn.Parameter]:
        """The stacked factors, to train all adapters at once. Add them before: the tensors then keep their size."""
        for shelf in self._shelves.values():
            shelf.fixed = True
        return [part for shelf in self._shelves.values() for place in shelf.places.values() for part in place.factors]

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> dict[str, float]:
        """Scale the gradients of each adapter down to this norm, each for itself; the norms before, by name."""
        norms = {}
        for name, member in self._members.items():
            gradients = (part.grad for place in member.shelf.places.values() for part in place.factors)
            own = [gradient[member.slot] for gradient in gradients if gradient is not None]
            norms[name] = float(nn.utils.get_total_norm(own))
            for gradient in own:
                gradient.mul_(min(1.0, max_norm / (norms[name] + 1e-6)))
        return norms

    def close(self) -> None:
        """Take the pool off its base, and forget all adapters."""
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()
        self._members.clear()
        self._shelves.clear()

    def nbytes(self) -> int:
        """Bytes of all that is held for adapters."""
        return sum(place.nbytes() for shelf in self._shelves.values() for place in shelf.places.values())

    # Computing.

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Give each row of the batches within an adapter, or `"__base__"`; names that are not loaded are read from
        `folder`. `generate` may repeat each row, for beams or several answers. To train, call backward within too.
        A thread that is started within computes with the base: call `use` in the thread that calls the model.

        Raises:
            ConfigError: an adapter is neither loaded nor in the folder, or more are named than there are slots.
            AdapterFileError: an adapter in the folder is damaged.
        """
        wanted = sorted(set(names) - {BASE})
        if self.slots is not None and len(wanted) > self.slots:
            raise ConfigError(f"AdapterPool.use: {len(wanted)} adapters are named for {self.slots} slots; raise slots")
        held: dict[str, Member] = {}
        try:
            with self._lock:
                for name in wanted:
                    held[name] = self._member(name)
                    self._in_use[name] += 1  # before the next is read, which may make another leave
            batch = Batch(tuple(names), held)
            token = _CURRENT.set((self, batch))
            self._trained = batch if torch.is_grad_enabled() else None
            try:
                yield
            finally:
                _CURRENT.reset(token)
        finally:
            with self._lock:
                self._in_use.subtract(list(held))

    def _batch(self) -> Batch | None:
        current = _CURRENT.get()
        if current is not None:
            return current[1] if current[0] is self else None
        return self._trained if torch._C._current_graph_task_id() != -1 else None  # a checkpoint in a thread of its own

    def _hook(self, path: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output of a layer of the base, with what the adapters of the rows add."""
        batch = self._batch()
        if batch is None:
            return output
        x = args[0]
        for shelf in batch.shelves:
            if (place := shelf.places.get(path)) is not None:
                rows, slots = batch.rows(shelf, len(x), x.device)
                added = self._product(place, batch, x if rows is None else x[rows], slots).to(output.dtype)
                output = output + added if rows is None else output.index_add(0, rows, added)
        return output

    def _product(self, place: Place, batch: Batch, x: Tensor, slots: Tensor) -> Tensor:
        x = in_autocast_dtype(x)
        flat, modulation = x.reshape(len(x), -1, x.shape[-1]), MODULATIONS[place.modulation]
        gathered: Gathered | None = None
        if torch.is_grad_enabled():
            batch.gathered.clear()  # an optimizer's step may come next
        else:
            key, state = (id(place), len(slots)), tuple(map(tensor_state, place.factors))
            kept = batch.gathered.get(key)
            if kept is None or kept[0] != state:
                kept = batch.gathered[key] = state, place.stack.gathered(slots)
            gathered = kept[1]

        def diagonal() -> Sequence[Tensor]:
            state = tensor_state(place.layer.weight)  # type: ignore[arg-type]  # a tensor
            if (kept := batch.diagonals.get(id(place))) is not None and kept[0] == state:
                return kept[1]
            anchor = modulation.anchor(self._weight(place.layer), place.blocks)
            assert anchor is not None
            found = diagonal_of(place.blocks, place.runs, anchor)
            if not torch.is_grad_enabled():
                batch.diagonals[id(place)] = state, found
            return found

        y = shared(place.stack, flat, slots, diagonal if modulation.anchors else None, gathered)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _weight(self, layer: nn.Module) -> Tensor:
        """W (out_features, in_features), dequantized where it is quantized."""
        backend = find_backend(layer, self.base)
        if backend is not None:
            return dequantized(backend, layer)
        return as_matrix(layer.weight, isinstance(layer, Conv1D))  # type: ignore[arg-type]  # a tensor

    # Loading.

    def _member(self, name: str) -> Member:
        with self._lock:
            if name not in self._members:
                folder, is_name = self.folder, Path(name).name == name and name not in ("", "..")
                if folder is None or not is_name or not (folder / name).is_dir():
                    known = [*self._members, *(path.name for path in (folder.iterdir() if folder else ()))]
                    raise ConfigError(f"AdapterPool: no adapter {name!r}{nearest(name, known)}")
                self.load(name, folder / name)
            self._members.move_to_end(name)
            return self._members[name]

    def _put(
        self, name: str, config: SmoaConfig, tensors: Mapping[str, Tensor], source: str, fresh: bool = False
    ) -> None:
        """Check tensors and write them into a slot; nothing is changed by an error."""
        if name == BASE or not name:
            raise ConfigError(f"AdapterPool: {name!r} can't name an adapter")
        layers = self._layers_of(config, tensors, source)
        signature = tuple((path, each.ranks, each.modulation, each.digest) for path, each in layers.items())
        with self._lock:
            if self._in_use[name]:
                raise ConfigError(f"AdapterPool.load: {name!r} is in use; wait for the batch to end")
            shelf, leaving = self._shelves.get(signature), self._leaving_for(name)
            trained = any(other.fixed for other in self._shelves.values()) if fresh and shelf is None else False
            if trained or not (shelf is None or shelf.has_room(self._members[other] for other in leaving)):
                raise ConfigError(
                    "AdapterPool: add all adapters before pool.parameters(), whose tensors keep their size"
                )
            if shelf is None:
                shelf = self._shelves[signature] = self._new_shelf(layers, source)
            for other in leaving:
                self.unload(other)
            slot = shelf.take(self.slots)
            for path, each in layers.items():
                shelf.places[path].write(slot, each, fresh, config)
            self._members[name] = Member(config, shelf, slot)

    def _leaving_for(self, name: str) -> list[str]:
        """The adapters that leave for a new one: that of its name, else the least recently used ones."""
        if name in self._members:
            return [name]
        surplus = 0 if self.slots is None else max(0, len(self._members) + 1 - self.slots)
        idle = [other for other in self._members if not self._in_use[other]]
        if len(idle) < surplus:
            raise ConfigError(f"AdapterPool: all {self.slots} slots are in use; raise slots, or wait")
        return idle[:surplus]

    def _layers_of(self, config: SmoaConfig, tensors: Mapping[str, Tensor], source: str) -> dict[str, Loaded]:
        """The checked tensors of each layer, by its path in the base."""
        found = by_layer(tensors, source, "a pool takes factors only, so load this adapter with PEFT")
        modules = dict(self.base.named_modules())
        layers = {}
        for path in sorted(found):
            layer = modules.get(path)
            if not isinstance(layer, nn.Linear | Conv1D):
                kind = "no such layer" if layer is None else f"a {type(layer).__name__}"
                raise AdapterFileError(f"{source}: {path} is {kind} in this base; a pool takes linear layers")
            layers[path] = Loaded.checked(path, Linear.shape_of(layer), config, found[path], source)
        return layers

    def _new_shelf(self, layers: Mapping[str, Loaded], source: str) -> Shelf:
        places = {}
        for path, each in layers.items():
            layer = self.base.get_submodule(path)
            self._check_base(path, each, source)
            places[path] = Place.like(each, layer, self.dtype)
            if path not in self._hooked:
                self._hooked[path] = layer.register_forward_hook(partial(self._hook, path))
        return Shelf(places)

    def _check_base(self, path: str, each: Loaded, source: str) -> None:
        """Raise AdapterFileError if spectral blocks of as many tell another base than those of the other adapters."""
        for shelf in self._shelves.values():
            place = shelf.places.get(path)
            if place is None or not (each.spectral and place.spectral) or len(place.ranks) != len(each.ranks):
                continue
            labels = torch.cat([place.blocks.row_labels, place.blocks.col_labels]).cpu()
            same = float((labels == torch.cat([each.row_labels, each.col_labels]).cpu()).float().mean())
            if same < ALIKE and len(each.ranks) > 1:
                raise AdapterFileError(
                    f"{source}: {path}: only {same:.0%} of its coordinates are in the blocks of the other adapters, so "
                    "it was made for another base; use a pool for each base"
                )
            return

    def _parts(self, member: Member) -> dict[str, list[tuple[str, Tensor]]]:
        return {path: place.parts(member.slot) for path, place in member.shelf.places.items()}


_CURRENT: ContextVar[tuple[AdapterPool, Batch] | None] = ContextVar("smoa_pool_batch", default=None)


def by_layer(tensors: Mapping[str, Tensor], source: str, remedy: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a saved adapter by layer and part; raises ConfigError, with the remedy, if it has any others."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, part = key.removeprefix(PREFIX).partition(".smoa_")
        if f"smoa_{part}" not in PARTS:
            raise ConfigError(f"{source}: has {key}; {remedy}")
        found.setdefault(path, {})[f"smoa_{part}"] = tensor
    return found


@dataclass(frozen=True)
class Loaded:
    """The checked tensors of one layer of an adapter."""

    ranks: tuple[int, ...]
    modulation: ModulationKind
    scaling: float
    spectral: bool
    A: Tensor
    B: Tensor
    row_labels: Tensor
    col_labels: Tensor
    block_scale: Tensor

    @classmethod
    def checked(
        cls, path: str, shape: tuple[int, int], config: SmoaConfig, parts: Mapping[str, Tensor], source: str
    ) -> Self:
        """Raises AdapterFileError unless all parts are there, finite, and fit a layer of this shape."""
        ranks = config.ranks_of(path, shape=shape)
        lacking = next((part for part in PARTS if part not in parts), None)
        if lacking is not None:
            raise AdapterFileError(f"{source}: lacks {path}.{lacking}; save or fetch the adapter again")
        sizes = *factor_shapes(*shape, ranks), *((size,) for size in (*shape, len(ranks)))
        scaling = config.alpha_of(path, sum(ranks), shape) / sum(ranks)
        A, B, rows, cols, scale = (parts[part] for part in PARTS)
        try:
            check_parts(path, {f"{path}.{part}": parts[part] for part in PARTS}, sizes, ranks, scaling, A.dtype)
        except AdapterFileError as error:
            raise AdapterFileError(f"{source}: {error}") from None
        return cls(ranks, config.modulation, scaling, config.partition == "spectral", A, B, rows, cols, scale.float())

    @property
    def digest(self) -> int:
        """Equal for equal blocks."""
        return hash((self.row_labels.cpu().numpy().tobytes(), self.col_labels.cpu().numpy().tobytes()))


@dataclass(eq=False)
class Place:
    """One layer's factors of all adapters of a shelf."""

    layer: nn.Module
    blocks: Blocks
    ranks: tuple[int, ...]
    runs: tuple[BlockRun, ...]
    modulation: ModulationKind
    spectral: bool
    factors: tuple[nn.Parameter, nn.Parameter]
    block_scale: Tensor
    scale: Tensor

    @classmethod
    def like(cls, each: Loaded, layer: nn.Module, dtype: torch.dtype | None) -> Place:
        """Without a slot yet."""
        device = next(layer.parameters()).device
        blocks = Blocks(each.row_labels.to(device), each.col_labels.to(device), len(each.ranks))
        runs = Factors(each.A, each.B, each.ranks, 1.0, each.block_scale, blocks).runs()
        dtype = dtype or each.A.dtype
        A, B = (nn.Parameter(torch.zeros(0, *part.shape, dtype=dtype, device=device)) for part in (each.A, each.B))
        block_scale = torch.zeros(0, len(each.ranks), device=device)
        scale = torch.zeros(0, sum(each.ranks), dtype=torch.promote_types(dtype, torch.float32), device=device)
        return cls(layer, blocks, each.ranks, runs, each.modulation, each.spectral, (A, B), block_scale, scale)

    @property
    def stack(self) -> StackedFactors:
        """The factors as the product takes them."""
        return StackedFactors(*self.factors, self.scale, self.blocks, self.runs)

    def grow(self, capacity: int) -> None:
        """Make room for so many adapters."""

        def grown(tensor: Tensor) -> Tensor:
            larger = tensor.new_zeros(capacity, *tensor.shape[1:])
            larger[: len(tensor)] = tensor
            return larger

        for part in self.factors:
            part.data = grown(part.data)
        self.block_scale, self.scale = grown(self.block_scale), grown(self.scale)

    @torch.no_grad()
    def write(self, slot: int, each: Loaded, fresh: bool, config: SmoaConfig) -> None:
        """Put an adapter's factors and scales into a slot; new ones are drawn."""
        A, B = (part.data[slot] for part in self.factors)
        if fresh:
            init_factors(A, B, self.blocks.shape, self.ranks, config.init_weights, 0.1 / each.scaling)
        else:
            A.copy_(each.A)
            B.copy_(each.B)
        self.block_scale[slot] = each.block_scale
        self.scale[slot] = rank_scale(self.block_scale[slot], self.ranks) * each.scaling

    def parts(self, slot: int) -> list[tuple[str, Tensor]]:
        """The tensors of a slot's adapter as they are saved."""
        A, B = (part.detach()[slot].cpu().clone() for part in self.factors)
        labels = self.blocks.row_labels.cpu().clone(), self.blocks.col_labels.cpu().clone()
        return list(zip(PARTS, (A, B, *labels, self.block_scale[slot].cpu().clone()), strict=True))

    def nbytes(self) -> int:
        """Bytes of factors, scales and blocks."""
        tensors = *self.factors, self.block_scale, self.scale, self.blocks.row_labels, self.blocks.col_labels
        return sum(tensor.nbytes for tensor in (*tensors, *self.blocks.orders))


@dataclass(eq=False)
class Shelf:
    """Adapters with the same layers, blocks, ranks and modulation, by slot."""

    places: dict[str, Place]
    free: list[int] = field(default_factory=list)
    capacity: int = 0
    fixed: bool = False
    """Whether an optimizer holds the factors, which then keep their size."""

    def has_room(self, leaving: Iterable[Member]) -> bool:
        """Whether there is a slot for one more adapter after these have left."""
        return not self.fixed or bool(self.free) or any(member.shelf is self for member in leaving)

    def take(self, slots: int | None) -> int:
        """A free slot; the tensors grow by an eighth where there is none."""
        if not self.free:
            larger = min(self.capacity + max(8, self.capacity // 8), max(slots or 1 << 62, self.capacity + 1))
            for place in self.places.values():
                place.grow(larger)
            self.free, self.capacity = list(range(self.capacity, larger))[::-1], larger
        return self.free.pop()


@dataclass(frozen=True)
class Member:
    """An adapter that is loaded."""

    config: SmoaConfig
    shelf: Shelf
    slot: int


@dataclass(eq=False)
class Batch:
    """The adapter of each row, and what the calls of one `use` keep."""

    names: tuple[str, ...]
    members: dict[str, Member]
    gathered: dict[tuple[int, int], tuple[Hashable, Gathered]] = field(default_factory=dict)
    diagonals: dict[int, tuple[Any, Sequence[Tensor]]] = field(default_factory=dict)
    _rows: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    @property
    def shelves(self) -> Iterable[Shelf]:
        """The shelves of the batch's adapters."""
        return {id(member.shelf): member.shelf for member in self.members.values()}.values()

    def rows(self, shelf: Shelf, count: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The rows of a batch of `count` that a shelf serves, None for all, and the slot of each."""
        key = id(shelf), count
        if key not in self._rows:
            copies, rest = divmod(count, len(self.names))
            if rest or not copies:
                raise ValueError(f"AdapterPool.use: {len(self.names)} names for {count} rows; give one for each row")
            repeated = [name for name in self.names for _ in range(copies)]
            own = [row for row, name in enumerate(repeated) if name != BASE and self.members[name].shelf is shelf]
            slots = torch.tensor([self.members[repeated[row]].slot for row in own], device=device)
            self._rows[key] = None if len(own) == count else torch.tensor(own, device=device), slots
        return self._rows[key]
