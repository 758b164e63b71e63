"""Thousands of adapters over one base: stacked factors, one product for the rows of all of them, no module for each."""

from __future__ import annotations

import copy
import re
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from smoa.atomic import write_whole
from smoa.config import Shape, SmoaConfig
from smoa.errors import AdapterFileError, ConfigError, MergeError, UnsupportedModuleError, first_of, nearest
from smoa.layers.layer import in_autocast_dtype, is_plain_linear, smoa_layers
from smoa.layers.linear import Linear
from smoa.layers.merging import as_matrix
from smoa.layers.quantized import dequantized, find_backend
from smoa.layers.weight_cache import tensor_state
from smoa.maths.kernels.shared import diagonal_of
from smoa.serving.groups import AdapterGroup, LayerStack, LoadedAdapter
from smoa.serving.saved import SavedLayer, Template, by_layer, checked_layers, folder_in, read_by_template, settings_of
from smoa.serving.uses import Batch, Uses
from smoa.tuner.generation import BASE, watch_generate

SEQUENCE_FIRST = ("fsmt", "led", "longformer", "xlnet")
"""Types of models that give layers inputs whose first dimension is the tokens."""
ROUTED = re.compile(r"(^|\.)experts?\.\d+(\.|$)")
"""The paths of layers within an expert that is a module."""
REMEDY = "a pool takes factors only, so load this adapter with PEFT"
ALIKE = 0.5
"""Share of coordinates in the same block above which two spectral adapters may be of one base, quantized or not."""


class AdapterPool:
    """Many adapters over one base model, with an adapter for each row of a batch.

        pool = AdapterPool(base, folder="adapters")
        with pool.use(["anna", "ben", "__base__"]):
            base.generate(**inputs)

    A layer's factors of all adapters with the same blocks and ranks are one tensor, so that a batch takes one product
    for each such group, however many adapters are in it (`smoa.maths.kernels.shared`). Loading is safe while batches
    run. Linear layers and Conv1D are supported, quantized or not; an adapter with anything else in its file (biases,
    modules_to_save, token embeddings) is refused by name.

    Args:
        base: The model. Its weights do not change, and outside `use` it computes as before.
        slots: Most adapters to hold; None for any number. When full, the least recently used one is dropped, unless it
            is new, or was trained since it was loaded or saved.
        folder: Holds a folder for each adapter, of its name, which is read when `use` names the adapter.
        dtype: Dtype of the factors; by default the first adapter's.

    Raises:
        ConfigError: the base, a part of it, or what it is a part of has a pool that is not closed.
        MergeError: adapters are merged into the base.
        UnsupportedModuleError: the base's weights are sharded, offloaded, or wrapped by PEFT, or its layers are given
            the tokens as first dimension.
    """

    def __init__(
        self,
        base: nn.Module,
        slots: int | None = None,
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        adapted = smoa_layers(base)
        if any(layer.merged for layer in adapted.values()):
            raise MergeError("AdapterPool: adapters are merged into the base; call unmerge_adapter first")
        modules = set(_without_peft(base).values())
        if (kind := getattr(getattr(base, "config", None), "model_type", None)) in SEQUENCE_FIRST:
            raise UnsupportedModuleError(
                f"AdapterPool: {kind} gives its layers tokens first, not rows; load its adapters with PEFT"
            )
        for name, parameter in base.named_parameters():
            if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or parameter.is_meta:
                raise UnsupportedModuleError(f"AdapterPool: {name} is sharded or offloaded; load the base whole")
        if slots is not None and slots < 1:
            raise ConfigError(f"AdapterPool: slots={slots} must be at least 1, or None")
        for known, pool in list(_POOLS.items()):
            if (known in modules or base in known.modules()) and (other := pool()) is not None:
                raise ConfigError(
                    f"AdapterPool: the base has a pool, with {len(other.names)} adapters; close that one first"
                )
        _POOLS[base] = weakref.ref(self)
        watch_generate(base)
        self.base, self.slots, self.dtype = base, slots, dtype
        self.folder = None if folder is None else Path(folder)
        self._adapters: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._groups: dict[Any, AdapterGroup] = {}
        self._in_use: Counter[str] = Counter()
        self._new: dict[str, tuple[SmoaConfig, dict[str, SavedLayer]]] = {}
        self._read: list[Template] = []
        self._hooked: dict[str, tuple[nn.Module, Any]] = {}
        self._lock = threading.RLock()
        self._uses = Uses()

    # Which adapters there are.

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded, the most recently used last."""
        return list(self._adapters)

    def load(self, name: str, source: str | Path) -> None:
        """Read a saved adapter. It replaces one of the same name.

        Raises:
            AdapterFileError: it is damaged, or was made for another base.
            ConfigError: its file has more than factors, or the name is taken by one that is in use.
        """
        with self._lock:
            self._leaving_for(name)  # raises where there is no slot, before anything is read
        config = SmoaConfig.from_pretrained(str(source))
        if not isinstance(config, SmoaConfig):
            raise ConfigError(f"{source}: is not a SMoA adapter but {getattr(config, 'peft_type', 'none')}")
        shapes_of = partial(self._shapes_of, str(source), _without_peft(self.base))
        adapter = read_by_template(self._read, str(source), config, REMEDY, shapes_of)
        self._put(name, config, *adapter, str(source), is_new=False)

    def add(self, name: str, config: SmoaConfig) -> None:
        """Add a new adapter, as `get_peft_model(base, config)` makes one, but without dropout.

        Raises:
            ConfigError: the name is taken, or the config trains more than factors.
        """
        if name in self._adapters:
            raise ConfigError(f"AdapterPool.add: {name!r} is there already; unload it, or choose another name")
        if config.smoa_dropout:
            warnings.warn(
                f"AdapterPool.add: a pool has no dropout, so smoa_dropout={config.smoa_dropout} has no effect",
                stacklevel=2,
            )
        if (settings := settings_of(config)) not in self._new:
            own = copy.deepcopy(config)
            found = by_layer(get_peft_model_state_dict(get_peft_model(self._twin(), own)), name, REMEDY)
            self._new[settings] = (
                own,
                checked_layers(found, self._shapes_of(name, _without_peft(self.base), sorted(found)), own, name),
            )
        filled, layers = self._new[settings]
        drawn = Template({path: layer.drawn(config.init_weights) for path, layer in layers.items()})
        self._put(name, copy.deepcopy(filled), drawn, None, name, is_new=True)

    def unload(self, name: str) -> None:
        """Forget an adapter and free its slot.

        Raises:
            ConfigError: there is none of this name, or a batch uses it.
        """
        with self._lock:
            if name not in self._adapters:
                raise ConfigError(f"AdapterPool.unload: no adapter {name!r}{nearest(name, self._adapters)}")
            if self._in_use[name]:
                raise ConfigError(f"AdapterPool.unload: {name!r} is in use; wait for the batch to end")
            adapter = self._adapters.pop(name)
            adapter.group.free.append(adapter.slot)

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as an ordinary PEFT folder."""
        with self._lock:  # another adapter may take the slot later
            adapter = self._adapter(name)
            saved, tensors = adapter.digest(), adapter.tensors()  # in this order: a step may come between
        write_whole(Path(folder, SAFETENSORS_WEIGHTS_NAME), save(tensors, {"format": "pt"}))
        adapter.config.save_pretrained(str(folder))
        adapter.saved = saved

    def parameters(self) -> list[nn.Parameter]:
        """The stacked factors, to train all adapters at once. Add adapters before: the tensors then keep their size.

        An adapter that takes the slot of one that has left needs a new optimizer: the old one keeps that one's moments.
        """
        with self._lock:
            before = [each for each in self._adapters.values() if each.is_saved and not each.group.fixed]
            for stack in self._stacks():
                stack.fixed = True
            for adapter in before:
                adapter.saved = adapter.digest()
            return [part for stack in self._stacks() for part in stack.parameters]

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> dict[str, float]:
        """Clip the gradients of each adapter by itself to this norm. Return the norms before clipping, by name."""
        norms = {}
        for name, adapter in self._adapters.items():
            gradients = (part.grad for stack in adapter.group.stacks.values() for part in stack.parameters)
            own = [gradient[adapter.slot] for gradient in gradients if gradient is not None]
            norms[name] = float(nn.utils.get_total_norm(own))
            for gradient in own:
                gradient.mul_(min(1.0, max_norm / (norms[name] + 1e-6)))
        return norms

    def close(self) -> None:
        """Remove the pool from its base, and forget all adapters.

        Raises:
            ConfigError: a batch or a request uses one.
        """
        with self._lock:
            if used := sorted(+self._in_use):
                raise ConfigError(f"AdapterPool.close: {used[0]!r} is in use; wait for the batch to end")
            for _, handle in self._hooked.values():
                handle.remove()
            for known in (self._hooked, self._adapters, self._groups, self._new, self._read):
                known.clear()
            _POOLS.pop(self.base, None)

    def nbytes(self) -> int:
        """Bytes held for all adapters."""
        return sum(stack.nbytes() for stack in self._stacks())

    def _stacks(self) -> list[LayerStack]:
        return [stack for group in self._groups.values() for stack in group.stacks.values()]

    # Computing.

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Give each sample of a batch its adapter, or `"__base__"`, while the context is open.

        Names that are not loaded are read from `folder`. `generate` may repeat samples, for beams or several answers. A
        thread that is started inside computes with the base: call `use` in the thread that calls the model. A generator
        that yields inside `use` needs a thread of its own: beside it, the base refuses calls. With gradient
        checkpointing, call backward inside the `use` of the forward.

        Raises:
            ConfigError: an adapter is neither loaded nor in the folder, or more are named than there are slots.
            AdapterFileError: an adapter in the folder is damaged.
            UnsupportedModuleError: layers of the base were replaced since their adapters were loaded.
        """
        if not names or isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"AdapterPool.use: names is {names!r}; give a list that names an adapter or '__base__' for each sample"
            )
        modules = set(_without_peft(self.base).values())
        for path, (layer, _) in list(self._hooked.items()):
            if layer not in modules:
                raise UnsupportedModuleError(
                    f"AdapterPool.use: {path} was replaced since its adapters were loaded; make a new pool"
                )
        wanted = sorted(set(names) - {BASE})
        if self.slots is not None and len(wanted) > self.slots:
            raise ConfigError(f"AdapterPool.use: {len(wanted)} adapters are named for {self.slots} slots; raise slots")
        held: dict[str, LoadedAdapter | None] = {}
        try:
            for name in wanted:
                held[name] = self.hold(name)
            self._forget_kept()
            with self.computing(Batch([held.get(name) for name in names])):
                yield
        finally:
            self.release(held)

    def hold(self, name: str) -> LoadedAdapter | None:
        """The adapter of a name, None for the base. It stays in its slot until `release` was called as often.

        Raises:
            ConfigError: it is neither loaded nor in the folder; NoSlotError if all slots are in use.
            AdapterFileError: it is damaged.
        """
        if name == BASE:
            return None
        with self._lock:
            adapter = self._adapter(name)
            self._in_use[name] += 1  # before another is read, which may make one leave
            return adapter

    def release(self, names: Iterable[str]) -> None:
        """Let adapters go that `hold` keeps in their slots."""
        with self._lock:
            self._in_use.subtract(name for name in names if name != BASE)

    def computing(self, batch: Batch) -> AbstractContextManager[None]:
        """Give the calls in this context a batch of adapters that are held."""
        return self._uses.opened(batch)

    def _forget_kept(self) -> None:
        """Drop the factors that batches keep, if an optimizer may have changed them: not all leave a trace."""
        if any(group.fixed for group in self._groups.values()):
            for batch in tuple(self._uses.open):
                batch.forget()

    def added(self, path: str, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The output of a layer of the base for x, with what the adapters of the samples add."""
        batch = self._uses.of_call(path)
        stacks = [] if batch is None else [(each, each.stacks[path]) for each in batch.groups if path in each.stacks]
        if batch is None or not stacks:
            return output
        is_own = is_plain_linear(layer, own_hooks=1)  # else others may hold the output
        x, total = batch.by_row(in_autocast_dtype(x)), batch.by_row(output if is_own else output.clone())
        if torch.is_grad_enabled():
            self._forget_kept()
        for group, stack in stacks:
            diagonal = partial(self._diagonal, stack, layer, batch)
            stack.add_to(total, x, batch.rows(group, len(x), path), diagonal)
        return total.view_as(output)

    def _diagonal(self, stack: LayerStack, layer: nn.Module, batch: Batch) -> Sequence[Tensor]:
        """The diagonal blocks of M."""
        # what is made in inference mode can't be used in training
        state = torch.is_inference_mode_enabled(), tensor_state(layer.weight)  # type: ignore[arg-type]
        if (kept := batch.diagonals.get(stack)) is not None and kept[0] == state:
            return kept[1]
        found = diagonal_of(stack.blocks, stack.runs, self._weight(layer))
        if not torch.is_grad_enabled():
            batch.diagonals[stack] = state, found
        return found

    def _weight(self, layer: nn.Module) -> Tensor:
        """W (out_features, in_features), dequantized where it is quantized; constant, also where the base trains."""
        backend = find_backend(layer, self.base)
        if backend is not None:
            return dequantized(backend, layer)
        return as_matrix(layer.weight.detach(), isinstance(layer, Conv1D))  # type: ignore[operator]  # a tensor

    # Loading.

    def _adapter(self, name: str) -> LoadedAdapter:
        with self._lock:
            if name not in self._adapters:
                found = None if self.folder is None else folder_in(self.folder, name)
                if found is None:
                    known = {*self._adapters, *(path.name for path in (self.folder.iterdir() if self.folder else ()))}
                    raise ConfigError(f"AdapterPool: no adapter {name!r}{nearest(name, known)}")
                self.load(name, found)
            self._adapters.move_to_end(name)
            return self._adapters[name]

    def _put(
        self, name: str, config: SmoaConfig, template: Template, numbers: Tensor | None, source: str, is_new: bool
    ) -> None:
        """Write a checked adapter into a slot; nothing is changed by an error."""
        if name == BASE or not name:
            raise ConfigError(f"AdapterPool: {name!r} can't name an adapter")
        signature = template.signature
        with self._lock, torch.inference_mode(False):  # what is made in inference mode can't be written to outside
            if self._in_use[name]:
                raise ConfigError(f"AdapterPool.load: {name!r} is in use; wait for the batch to end")
            group, leaving = self._groups.get(signature), self._leaving_for(name)
            trained = any(other.fixed for other in self._groups.values()) if is_new and group is None else False
            if trained or not (group is None or group.has_room(self._adapters[other] for other in leaving)):
                raise ConfigError(
                    "AdapterPool: add all adapters before pool.parameters(), whose tensors keep their size"
                )
            if group is None:
                group = self._groups[signature] = self._new_group(template.layers, source)
            for other in leaving:
                self.unload(other)
            slot = group.take(self.slots)
            group.write(slot, template, numbers)
            self._adapters[name] = adapter = LoadedAdapter(config, group, slot)
            adapter.saved = None if is_new else adapter.digest()
            self._groups = {key: each for key, each in self._groups.items() if each.fixed or not each.is_empty}

    def _leaving_for(self, name: str) -> list[str]:
        """The adapters that leave for a new one: that of its name, else the least recently used ones."""
        if name in self._adapters:
            return [name]
        surplus = 0 if self.slots is None else max(0, len(self._adapters) + 1 - self.slots)
        idle = (other for other, adapter in self._adapters.items() if not self._in_use[other] and adapter.is_saved)
        if len(leaving := list(islice(idle, surplus))) == surplus:
            return leaving
        lost = sorted(other for other, adapter in self._adapters.items() if not adapter.is_saved)
        if len(self._adapters) - len(lost) < surplus:
            raise ConfigError(
                f"AdapterPool: no slot for {name!r}, since {first_of(lost)} would be lost: new, or trained since the "
                "last save; save or unload one, or raise slots"
            )
        raise NoSlotError(f"AdapterPool: all {self.slots} slots are in use; raise slots, or wait")

    def _shapes_of(self, source: str, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> dict[str, Shape]:
        """(out_features, in_features) of each layer at these paths in the base."""
        places, shapes = Counter(modules.values()), {}
        for path in paths:
            layer = modules.get(path)
            if not isinstance(layer, nn.Linear | Conv1D):
                kind = "no such layer" if layer is None else f"a {type(layer).__name__}"
                raise AdapterFileError(f"{source}: {path} is {kind} in this base; a pool takes linear layers")
            if ROUTED.search(path):
                raise UnsupportedModuleError(
                    f"{source}: {path} is an expert, which is given tokens of many samples; load this adapter with PEFT"
                )
            if places[layer] > 1:
                raise UnsupportedModuleError(
                    f"{source}: {path} stands at {places[layer]} places of this base, of which an adapter is for one; "
                    "load this adapter with PEFT"
                )
            shapes[path] = Linear.shape_of(layer)
        return shapes

    def _new_group(self, layers: Mapping[str, SavedLayer], source: str) -> AdapterGroup:
        stacks = {}
        for path, each in layers.items():
            layer = self.base.get_submodule(path)
            self._check_base(path, each, source)
            stacks[path] = LayerStack([each], [len(each.row_labels)], next(layer.parameters()).device, self.dtype)
            if path not in self._hooked:
                self._hooked[path] = layer, layer.register_forward_hook(Hook(weakref.ref(self), path))
        return AdapterGroup(stacks)

    def _check_base(self, path: str, each: SavedLayer, source: str) -> None:
        """Raise AdapterFileError if spectral blocks of as many tell another base than those of the other adapters."""
        for stack in (group.stacks[path] for group in self._groups.values() if path in group.stacks):
            if not (each.is_spectral and stack.is_spectral) or len(stack.ranks) != len(each.ranks):
                continue
            labels = torch.cat([stack.blocks.row_labels, stack.blocks.col_labels]).cpu()
            same = float((labels == torch.cat([each.row_labels, each.col_labels]).cpu()).float().mean())
            if same < ALIKE and len(each.ranks) > 1:
                raise AdapterFileError(
                    f"{source}: {path}: only {same:.0%} of its coordinates are in the blocks of the other adapters, so "
                    "it was made for another base; use a pool for each base"
                )
            return

    def _twin(self) -> Any:
        """A base of other modules with the same weights, of which PEFT may change what it likes."""
        shared = {id(part): part for part in (*self.base.parameters(), *self.base.buffers())}
        trained = {id(part): nn.Parameter(part.data) for part in self.base.parameters() if part.requires_grad}
        return copy.deepcopy(self.base, shared | trained)


class NoSlotError(ConfigError):
    """All slots are in use; one will be free once a batch or a request ends."""


@dataclass
class Hook:
    """Adds to a layer's output what its pool's adapters do. A copy of the base, or one from a file, has no pool."""

    pool: weakref.ref[AdapterPool] | None
    path: str

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        pool = None if self.pool is None else self.pool()
        return output if pool is None else pool.added(self.path, layer, args[0], output)

    def __reduce__(self) -> Any:
        return Hook, (None, self.path)


def _without_peft(base: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base, by each of their names.

    Raises:
        UnsupportedModuleError: PEFT has adapted it.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer | PeftModel):
            raise UnsupportedModuleError(
                f"AdapterPool: takes a base model without PEFT, which has adapted {name or 'it'}; call model.unload() "
                "first"
            )
    return modules


_POOLS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AdapterPool]] = weakref.WeakKeyDictionary()
