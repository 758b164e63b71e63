"""The plugin without vLLM: reading adapters, refusals, slots. tests/slow/serve runs it in the real one."""

import asyncio
import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoa import AdapterFileError, ConfigError, SmoaConfig
from smoa.compat import PREFIX
from smoa.kernels.plan import RowsBySlot
from smoa.partition import Blocks
from smoa.vllm import TRIED, register
from smoa.vllm.saved import SavedLayer, Template, read_layers
from smoa.vllm.slots import Slots
from tests.support import fakes, tiny
from tests.support.fakes import import_with_stubs
from tests.support.layers import CASES, Problem, assert_close, problem

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "anna": {"r": 4, "num_blocks": 2},
    "ben": {"r": 4, "num_blocks": 2},
    "cleo": {
        "r": 7,
        "num_blocks": 3,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "scale": "paper",
        "alpha": 9,
    },
    "dora": {"r": 5, "partition": "contiguous", "use_rslora": True},
    "emil": {
        "r": 4,
        "num_blocks_pattern": {"k_proj": 4},
        "rank_pattern": {"up_proj": 6},
        "alpha_pattern": {"q_proj": 30},
    },
    "fay": {"r": 4, "modulation": "none"},
    "gus": {"r": 4, "scale": "layer"},
}


# Slots of one layer.


def part(case: Problem, modulation: Any = "hadamard", scaling: float = 1.0) -> SavedLayer:
    partition = case.partition
    labels = partition.row_labels, partition.col_labels
    A, B = case.A.detach(), case.B.detach()
    return SavedLayer(case.ranks, modulation, scaling, A, B, *labels, torch.ones(len(case.ranks)))


SLOTS = [
    [0, 2, -1, 3, 3, 4, 0, -1, *[2] * 40, *[0, 3, 4] * 45],  # slot 2 has so many that its ΔW is formed
    [*[0] * 200, -1, *[2] * 100, *[4] * 30, *[3] * 9, -1],  # prompts, at rank 1 one of them in two pieces
]
CPU = torch.device("cpu")


def one_rank(sizes: list[int], weight: Tensor, is_stored: bool = False) -> Slots:
    return Slots(sizes, None, lambda: (weight, is_stored), CPU)


def added(layer: Slots, x: Tensor, rows: RowsBySlot, width: int) -> Tensor:
    output = x.new_zeros(len(x), width)
    with torch.no_grad():
        layer.add_to(output, x, rows)
    return output


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(("kind", "is_stored"), [("spectral", False), ("contiguous", False), ("contiguous", True)])
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_each_token_gets_what_its_adapter_adds_to_each_slice(
    out_features: int,
    in_features: int,
    ranks: tuple[int, ...],
    kind: str,
    is_stored: bool,
    slots: list[int],
    modulation: str,
) -> None:
    sizes = [out_features, out_features + 3, out_features]
    slices = [problem(size, in_features, ranks, of) for size, of in zip(sizes, (kind, "contiguous", kind), strict=True)]
    weight, deltas = torch.cat([own.weight for own in slices]).float(), {}
    layer = one_rank(sizes, weight, is_stored)
    for slot, given in ((0, (0, 1, 2)), (2, (0, 1, 2)), (3, (0, 2)), (4, (1,))):
        new = [own._replace(A=torch.randn_like(own.A), B=torch.randn_like(own.B)) for own in slices]
        parts = [part(own, modulation, slot + 1) if place in given else None for place, own in enumerate(new)]
        layer.set(slot, parts)
        own_deltas = [own.oracle(modulation, slot + 1) * (place in given) for place, own in enumerate(new)]
        deltas[slot] = torch.cat(own_deltas)
    x = torch.randn(len(slots), in_features)
    expected = [
        x[token].double() @ deltas[slot].T if slot >= 0 else torch.zeros(sum(sizes)) for token, slot in enumerate(slots)
    ]
    found = added(layer, x, RowsBySlot(slots), sum(sizes))
    torch.testing.assert_close(found.double(), torch.stack([e.double() for e in expected]), rtol=1e-4, atol=1e-3)


def test_a_slot_serves_the_adapter_that_was_put_there_last() -> None:
    cases = [problem(12, 10, (2, 1)), problem(12, 10, (2, 1, 1))]
    first, second = (own._replace(weight=cases[0].weight) for own in cases)
    third = second._replace(A=torch.randn_like(second.A), B=torch.randn_like(second.B))
    calls = list[int]()

    def weight() -> tuple[Tensor, bool]:
        calls.append(1)
        return first.weight.float(), False

    layer, x, rows = Slots([12], None, weight, CPU), torch.randn(3, 10), RowsBySlot([1, 1, -1])
    turned = RowsBySlot([3, 1, 1])  # whose factors are copied, and kept while no slot changes
    for case, number_of_calls in ((first, 1), (second, 2), (third, 2), (first, 3)):
        layer.reset(1)
        layer.reset(3)
        assert not added(layer, x, rows, 12).any()
        layer.set(1, [part(case)])
        layer.set(3, [part(case, scaling=2)])
        expected = (x.double() @ case.oracle("hadamard").T).float()
        of_turned = expected * torch.tensor([[2.0], [1.0], [1.0]])
        assert_close(added(layer, x, turned, 12), of_turned)
        assert_close(added(layer, x, rows, 12)[:2], expected[:2])
        for _ in range(2):
            assert_close(added(layer, x, turned, 12), of_turned)
        assert len(calls) == number_of_calls
    assert len(layer.stacks) == 1  # those that hold nobody leave when another comes
    layer.clear()
    assert not added(layer, x, rows, 12).any()


def test_kinds_take_no_more_memory_than_they_have_adapters_whatever_slots_these_are_in() -> None:
    cases, random = [problem(12, 10, (rank, 1)) for rank in range(1, 6)], Random(0)
    slots, kinds = 12, [case._replace(weight=cases[0].weight, partition=cases[0].partition) for case in cases]
    layer, x = one_rank([12], cases[0].weight.float()), torch.randn(2 * slots, 10)
    held, most = dict[int, Tensor](), dict[int, int]()
    for slot in [random.randrange(slots) for _ in range(100)]:
        if held.pop(slot, None) is not None:
            layer.reset(slot)
        if random.random() < 0.7:
            case = random.choice(kinds)
            own = case._replace(A=torch.randn_like(case.A), B=torch.randn_like(case.B))
            layer.set(slot, [part(own)])
            held[slot] = own.oracle("hadamard", 1)
        asked = random.choices([-1, *held], k=len(x))
        expected = [x[row].double() @ held[slot].T if slot >= 0 else torch.zeros(12) for row, slot in enumerate(asked)]
        assert_close(added(layer, x, RowsBySlot(asked), 12), torch.stack(expected))
        for stack in layer.stacks.values():
            most[id(stack)] = max(most.get(id(stack), 0), len(stack.places))
            assert len(stack.factors[0][0]) <= most[id(stack)] * 5 // 4


def test_adapters_take_what_was_reserved_and_new_weights_are_read_after_a_clear() -> None:
    """vLLM drops all adapters when it has measured memory, and when it has replaced the weights."""
    case = problem(12, 10, (2, 1))
    W, x, rows = case.weight.float(), torch.randn(2, 10), RowsBySlot([0, -1])
    layer = Slots([12], None, lambda: (W, False), CPU)
    layer.reserve([part(case)], 2)
    (stack,) = layer.stacks.values()
    layer.set(0, [part(case)])
    layer.others.add(1)
    assert ([*layer.stacks.values()], len(stack.factors[0][0])) == ([stack], 2)
    layer.clear()
    del stack
    W *= 2
    assert not added(layer, x, rows, 12).any()
    layer.set(0, [part(case)])
    assert_close(added(layer, x, rows, 12)[:1], (2 * x.double() @ case.oracle("hadamard").T).float()[:1])
    assert layer.others == {1}  # vLLM's own tensors keep what is in them


@pytest.mark.parametrize("kind", ["spectral", "contiguous"])
def test_a_base_in_16_bits_is_served(kind: str) -> None:
    case = problem(64, 48, (4, 4), kind)
    W, x = case.weight.bfloat16(), torch.randn(3, 48).bfloat16()
    layer = Slots([64], None, lambda: (W, True), CPU)
    layer.set(0, [part(case)])
    rounded = case._replace(weight=W.double()).oracle("hadamard")
    expected = (x.double() @ rounded.T * torch.tensor([[1.0], [0.0], [1.0]])).detach()
    found = added(layer, x, RowsBySlot([0, -1, 0]), 64)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))


# A rank's piece of a layer.


def pieces(sizes: list[int], in_features: int, ranks: int, kind: str) -> list[list[tuple[Tensor, Tensor]]]:
    """What each rank has of each slice: of a column-parallel layer, one whose last slice is replicated, or a
    row-parallel one."""
    rows, cols = [torch.arange(size) for size in sizes], torch.arange(in_features)
    if kind == "row":
        return [[(own, part) for own in rows] for part in cols.tensor_split(ranks)]
    if kind == "two in one":  # both halves of one slice, as in a layer that is fused in the checkpoint
        halves = [(own[: len(own) // 2], own[len(own) // 2 :]) for own in rows]
        return [
            [(torch.cat([half.tensor_split(ranks)[rank] for half in own]), cols) for own in halves]
            for rank in range(ranks)
        ]
    last = [rows[-1]] * ranks if kind == "replicated" else rows[-1].tensor_split(ranks)
    return [
        [*((own.tensor_split(ranks)[rank], cols) for own in rows[:-1]), (last[rank], cols)] for rank in range(ranks)
    ]


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
@pytest.mark.parametrize("how", ["column", "replicated", "two in one", "row"])
@pytest.mark.parametrize("ranks_of_blocks", [(2, 2, 2, 2), (3, 0, 2), (1,) * 7, (4,)])
@pytest.mark.parametrize(("kind", "is_stored"), [("spectral", False), ("contiguous", False), ("contiguous", True)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_add_what_one_adds(
    ranks: int, kind: str, is_stored: bool, ranks_of_blocks: tuple[int, ...], how: str, modulation: str
) -> None:
    sizes, slots = [24, 17, 17], [0, 0, 1, -1, 1, *[0] * 70]
    slices = [problem(size, 20, ranks_of_blocks, kind) for size in sizes]
    x, total = torch.randn(len(slots), 20), torch.zeros(len(slots), sum(sizes), dtype=torch.float64)
    adapters = [
        [own._replace(A=torch.randn_like(own.A), B=torch.randn_like(own.B)) for own in slices] for _ in range(2)
    ]
    for own in pieces(sizes, 20, ranks, how):
        cols = own[0][1]
        weight = torch.cat([case.weight[rows][:, cols] for case, (rows, _) in zip(slices, own, strict=True)]).float()
        mine = [len(rows) for rows, _ in own]
        layer = Slots(mine, lambda own=own: own, lambda weight=weight: (weight, is_stored), CPU)  # type: ignore[misc]
        for slot, cases in enumerate(adapters):
            layer.set(
                slot, [None if slot and place == 1 else part(case, modulation, 2) for place, case in enumerate(cases)]
            )
        found = added(layer, x[:, cols], RowsBySlot(slots), sum(mine)).double()
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        places = torch.cat([rows + start for (rows, _), start in zip(own, starts, strict=True)])
        if how == "row":
            total[:, places] += found
        else:
            total[:, places] = found
    deltas = [[case.oracle(modulation, 2) for case in cases] for cases in adapters]
    deltas[1][1] = torch.zeros_like(deltas[1][1])
    expected = torch.stack(
        [x[row].double() @ torch.cat(deltas[slot]).T if slot >= 0 else total[row] * 0 for row, slot in enumerate(slots)]
    )
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def test_a_rank_may_have_rows_of_a_block_between_two_and_no_column_of_it() -> None:
    case = problem(6, 6, (1, 1, 1), "contiguous")
    shuffled = part(case)
    shuffled = replace(shuffled, col_labels=shuffled.col_labels[torch.tensor([0, 1, 4, 5, 2, 3])])
    x, W, total = torch.randn(5, 6), case.weight.float(), torch.zeros(5, 6)
    for own in pieces([6], 6, 2, "row") + pieces([6], 6, 3, "row"):  # columns of blocks 0, 0, 2 and so on
        weight = W[:, own[0][1]]
        layer = Slots([6], lambda own=own: own, lambda weight=weight: (weight, True), CPU)  # type: ignore[misc]
        layer.set(0, [shuffled])
        total += added(layer, x[:, own[0][1]], RowsBySlot([0] * 5), 6)
    whole = one_rank([6], W)
    whole.set(0, [shuffled])
    torch.testing.assert_close(total, 2 * added(whole, x, RowsBySlot([0] * 5), 6))


@pytest.mark.parametrize("how", ["column", "row"])
def test_contiguous_blocks_of_a_multiple_of_the_ranks_cost_nothing_more(how: str) -> None:
    case = problem(48, 40, (1,) * 8, "contiguous")
    for own in pieces([48], 40, 4, how):
        weight = case.weight[own[0][0]][:, own[0][1]].float()
        layer = Slots([len(weight)], lambda own=own: own, lambda weight=weight: (weight, False), CPU)  # type: ignore[misc]
        layer.set(0, [part(case)])
        (stack,) = layer.stacks.values()
        assert [run.shape for run in stack.runs] == [(2, 6, 5)]
        assert stack.blocks.blocks.is_contiguous  # so that x and y are not sorted


def test_spectral_blocks_of_a_rank_are_one_product() -> None:
    case = problem(48, 40, (1,) * 6)
    for own in pieces([48], 40, 4, "column"):
        weight = case.weight[own[0][0]].float()
        layer = Slots([12], lambda own=own: own, lambda weight=weight: (weight, False), CPU)  # type: ignore[misc]
        layer.set(0, [part(case)])
        (stack,) = layer.stacks.values()
        assert len(stack.runs) == 1


# Memory.


def test_adapters_of_equal_partition_share_the_blocks_of_the_weight_whatever_their_rank() -> None:
    small, calls = problem(12, 10, (1, 1, 1)), list[int]()
    large = problem(12, 10, (2, 3, 3))._replace(partition=small.partition, weight=small.weight)

    def weight() -> tuple[Tensor, bool]:
        calls.append(1)
        return small.weight.float(), False

    layer, x = Slots([12], None, weight, CPU), torch.randn(2, 10)
    for slot, case in enumerate([small, large]):
        layer.set(slot, [part(case)])
    assert len(calls) == 1
    assert len({stack.blocks for stack in layer.stacks.values()}) == 1
    shapes = [[tuple(part.shape[2:]) for part in stack.factors[0]] for stack in layer.stacks.values()]
    assert shapes == [[(1, 3, 4), (1, 3, 4)], [(3, 3, 4), (3, 3, 4)]]  # with the most ranks that a block has
    found = added(layer, x, RowsBySlot([0, 1]), 12)
    for row, case in enumerate([small, large]):
        assert_close(found[row], (x[row].double() @ case.oracle("hadamard").T).float())


def test_blocks_of_a_weight_that_is_stored_plainly_are_views_of_it() -> None:
    slices = [problem(12, 10, (1, 1), "contiguous") for _ in range(2)]
    weight = torch.cat([own.weight for own in slices]).float()
    layer = one_rank([12, 12], weight, is_stored=True)
    layer.set(0, [part(own) for own in slices])
    (stack,) = layer.stacks.values()
    assert all(own.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for own in stack.blocks.entries)


# In vLLM's manager.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("adapters")
    for name, settings in KINDS.items():
        given = {"target_modules": LINEAR, "init_weights": False} | settings
        get_peft_model(tiny.build("llama"), SmoaConfig(**given)).save_pretrained(room / name)
    lora = get_peft_model(tiny.build("llama"), LoraConfig(target_modules=["down_proj"]))
    lora.save_pretrained(room / "lora")
    return room


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return import_with_stubs(monkeypatch, "smoa.vllm.plugin", fakes.stubs())


class Engine:
    """A worker of the fake vLLM with the plugin in it."""

    def __init__(self, slots: int = 8, **settings: Any) -> None:
        worker_manager: Any = importlib.import_module("vllm.lora.worker_manager")
        for _ in range(2):  # vLLM may load a plugin more than once
            register()
        self.worker = worker_manager.WorkerLoRAManager()
        model, self.config = tiny.build("llama"), fakes.engine_config(**settings)
        self.manager = worker_manager.create_lora_manager(model, slots, vllm_config=self.config)
        self.worker._adapter_manager = self.manager

    def load(self, folder: Path, number: int = 1) -> Any:
        return self.worker._load_adapter(SimpleNamespace(lora_path=str(folder), lora_int_id=number))


@pytest.mark.usefixtures("names")
@torch.no_grad()
def test_adapters_of_all_kinds_share_a_batch(folder: Path) -> None:
    engine = Engine()
    for number, name in enumerate([*KINDS, "lora"], start=1):
        engine.manager.activate(engine.load(folder / name, number), number - 1)
    adapters = [0, *range(1, len(KINDS) + 2), 1, *[3] * 33]
    engine.manager.map_tokens(adapters)
    models = [tiny.build("llama").double().eval()]
    for name in KINDS:
        base, place = tiny.build("llama").double(), str(folder / name)
        models.append(PeftModel.from_pretrained(base, place, autocast_adapter_dtype=False).get_base_model())
    for fused, layer in engine.manager.modules.items():
        if fused == "lm_head":
            continue
        x = torch.randn(len(adapters), layer.input_size)
        found = layer(x).double()
        assert layer.applied == (fused == "model.layers.0.mlp.down_proj")  # the only one that the LoRA has
        paths = engine.manager.packed_modules.get(fused, [fused])
        for number, model in enumerate(models):
            rows = [row for row, own in enumerate(adapters) if own == number]
            expected = torch.cat([model.get_submodule(path)(x[rows].double()) for path in paths], dim=-1)
            torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("names")
@torch.no_grad()
def test_without_a_lora_in_the_batch_vllm_computes_none(folder: Path) -> None:
    engine = Engine()
    engine.manager.activate(engine.load(folder / "anna"), 0)
    layer, x = engine.manager.modules["model.layers.1.mlp.down_proj"], torch.randn(2, 48)
    engine.manager.map_tokens([1, 0])
    before = layer(x)
    assert not torch.equal(before[0], layer.base_layer.packed @ x[0])
    assert layer.applied == 0
    assert not logits(engine).any()
    engine.manager.activate(engine.load(folder / "lora", 2), 1)
    engine.manager.map_tokens([1, 2])
    assert logits(engine).all()
    engine.manager.remove_all_adapters()
    assert torch.equal(layer(x)[0], (x @ layer.base_layer.packed.T)[0])


def logits(engine: Engine) -> Tensor:
    """What vLLM adds for LoRA to the logits of a batch: ones, or nothing if it isn't asked."""
    y = torch.zeros(2, 3)
    engine.manager.wrapper.add_lora_logits(y, torch.zeros(2, 3))
    return y


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.usefixtures("names")
@torch.no_grad()
def test_ranks_of_tensor_parallelism_serve_what_one_device_does(ranks: int, folder: Path) -> None:
    adapters, found = [0, 1, 2, 3, 4, 5, 6, 7, 0, *[2] * 30], dict[str, list[Tensor]]()
    inputs = {size: torch.randn(len(adapters), size) for size in (32, 48)}

    def outputs(**settings: Any) -> dict[str, list[Tensor]]:
        engine = Engine(**settings)
        for number, name in enumerate(KINDS, start=1):
            engine.manager.activate(engine.load(folder / name, number), number - 1)
        engine.manager.map_tokens(adapters)
        layers = {name: layer for name, layer in engine.manager.modules.items() if name != "lm_head"}
        cut = {name: inputs[layer.base_layer.input_size] for name, layer in layers.items()}
        for name, layer in layers.items():
            if isinstance(layer, fakes.RowParallelLinearWithLoRA):
                cut[name] = layer.slice_lora_a(cut[name])
        return {name: list(layer(cut[name]).split(layer.output_slices, 1)) for name, layer in layers.items()}

    expected = outputs()
    of_ranks = [outputs(tensor_parallel_rank=rank, tensor_parallel_size=ranks) for rank in range(ranks)]
    for name, of_slices in expected.items():
        for place, whole in enumerate(of_slices):
            own = [of_rank[name][place] for of_rank in of_ranks]
            if own[0].shape == whole.shape:
                found = torch.stack(own).sum(0)
            else:
                found = torch.cat(own[:: ranks * own[0].shape[1] // whole.shape[1]], 1)
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_engine_that_serves_lora_only_computes_nothing_of_ours(
    folder: Path, names: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    engine.manager.activate(engine.load(folder / "lora"), 0)
    engine.manager.map_tokens([1, 0, 1])
    monkeypatch.delattr(names, "RowsBySlot")  # without which there is no product
    for layer in engine.manager.modules.values():
        if isinstance(layer, fakes.BaseLinearLayerWithLoRA):
            x = torch.randn(3, layer.input_size)
            assert torch.equal(layer(x), x @ layer.base_layer.packed.T)
            assert layer.applied == 1


@pytest.mark.usefixtures("names")
@torch.no_grad()
def test_weights_that_are_replaced_directly_are_those_that_adapters_multiply_with(folder: Path) -> None:  # E8
    engine = Engine()
    layer, x = engine.manager.modules["model.layers.1.mlp.down_proj"], torch.randn(1, 48)
    engine.manager.activate(engine.load(folder / "anna"), 0)
    engine.manager.map_tokens([1])
    added = layer(x) - x @ layer.base_layer.packed.T
    engine.manager.model.load_weights([1.005])  # as a trainer that sends its weights
    engine.manager.map_tokens([0])
    assert torch.equal(layer(x), x @ layer.base_layer.packed.T)
    engine.manager.activate(engine.load(folder / "anna"), 0)
    engine.manager.map_tokens([1])
    torch.testing.assert_close(layer(x) - x @ layer.base_layer.packed.T, 1.005 * added, rtol=1e-4, atol=1e-5)


# In vLLM's memory, and its cache of compiled models.


@pytest.mark.usefixtures("names")
def test_memory_of_named_kinds_is_taken_when_layers_are_made(folder: Path) -> None:
    engine = Engine(additional_config={"smoa_examples": [str(folder / "anna")]})  # vLLM measures memory after that
    held = factors(engine)
    assert held
    for slot, name in enumerate(("anna", "ben")):
        engine.manager.activate(engine.load(folder / name, slot + 1), slot)
    assert factors(engine) == held
    engine.manager.remove_all_adapters()


def smoa_layers(engine: Engine) -> list[Any]:
    return [layer for layer in engine.manager.modules.values() if hasattr(layer, "smoa")]


def factors(engine: Engine) -> dict[int, int]:
    """Place and bytes of all factors."""
    stacks = [stack for layer in smoa_layers(engine) for stack in layer.smoa.stacks.values()]
    return {own.data_ptr(): own.nbytes for stack in stacks for pair in stack.factors for own in pair}


@pytest.mark.parametrize(
    ("example", "settings", "reason"),
    [
        ("nobody", {}, "nobody"),
        ("lora", {}, "lora"),
        ("anna", {"cudagraph_mode": "FULL_AND_PIECEWISE"}, "-cc.cudagraph_mode=PIECEWISE"),
    ],
)
@pytest.mark.usefixtures("names")
def test_an_example_that_cant_be_served_stops_the_start(
    example: str, settings: dict[str, Any], reason: str, folder: Path
) -> None:
    with pytest.raises((ConfigError, AdapterFileError), match=reason):
        Engine(additional_config={"smoa_examples": [str(folder / example)]}, **settings)


@pytest.mark.usefixtures("names")
def test_a_compiled_model_is_cut_at_the_operator_and_has_another_key_in_the_cache() -> None:
    engine = Engine(mode="VLLM_COMPILE", cudagraph_mode="PIECEWISE")
    assert engine.config.compilation_config.splitting_ops == ["vllm::unified_attention", "vllm::smoa_add"]
    assert engine.config.additional_config == {"smoa": True}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"bias": "all"}, "bias='all'"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("names")
def test_what_vllm_cant_serve_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[kind]
    config = SmoaConfig(r=4, **{"target_modules": ["q_proj"]} | settings)
    get_peft_model(tiny.build("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{reason}.*smoa merge"):
        Engine().load(tmp_path)


@pytest.mark.usefixtures("names")
def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    config = SmoaConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(tiny.build("qwen3_moe"), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"target_parameters.*smoa merge"):
        Engine().load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [("cut", SafetensorError, "incomplete metadata"), ("lost", AdapterFileError, r"smoa_B\.weight is missing")],
)
@pytest.mark.usefixtures("names")
def test_a_damaged_folder_is_refused(
    damage: str, error: type[Exception], reason: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "anna", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("smoa_B.weight"))
    if damage == "lost":
        del tensors[key]
    save_file(tensors, file, {"format": "pt"})
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    engine = Engine()
    engine.load(folder / "anna")  # by whose like the other is read, if it is sound
    with pytest.raises(error, match=reason):
        engine.load(tmp_path)


@pytest.mark.usefixtures("names")
def test_an_unreadable_config_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        Engine().load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"cudagraph_mode": "FULL_AND_PIECEWISE"}, "-cc.cudagraph_mode=PIECEWISE"),
        ({"mode": "VLLM_COMPILE", "splitting_ops": ["vllm::attention"]}, "vllm::smoa_add"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        ({"fully_sharded_loras": True}, "--fully-sharded-loras"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
@pytest.mark.usefixtures("names")
def test_an_engine_that_cant_serve_smoa_says_why_and_serves_lora(
    settings: dict[str, Any], remedy: str, folder: Path
) -> None:
    engine = Engine(**settings)
    with pytest.raises(ConfigError, match=remedy):
        engine.load(folder / "anna")
    assert engine.load(folder / "lora").rank == 8
    assert {type(layer) for layer in engine.manager.modules.values()} == {
        fakes.ColumnParallelLinearWithLoRA,
        fakes.RowParallelLinearWithLoRA,
        torch.nn.Identity,
    }
    assert not engine.config.compilation_config.static_forward_context
    assert engine.config.additional_config == {}


@pytest.mark.parametrize("lost", ["create_lora_manager", "WorkerLoRAManager"])
def test_a_vllm_that_lacks_a_name_stays_as_it_is(
    lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stubs = fakes.stubs()
    del stubs["vllm.lora.worker_manager"][lost]
    before = dict(stubs["vllm.lora.worker_manager"])
    import_with_stubs(monkeypatch, "smoa.vllm.plugin", stubs)
    register()
    assert len(caplog.messages) == 1
    assert lost in caplog.messages[0]
    assert all(version in caplog.messages[0] for version in TRIED)
    worker_manager = sys.modules["vllm.lora.worker_manager"]
    assert all(getattr(worker_manager, name) is value for name, value in before.items())


# Finding adapters by their names.


def test_a_folder_of_the_adapters_name_is_found_and_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    for name, own in (("anna", "anna"), ("ben", "ben"), ("lora", "lora"), ("anna", "inner/anna")):
        shutil.copytree(folder / name, place / own)
        config = PeftConfig.from_pretrained(place / own)
        config.base_model_name_or_path = "its/base"
        config.save_pretrained(place / own)
    stubs = fakes.stubs()
    resolver = import_with_stubs(monkeypatch, "smoa.vllm.resolver", stubs)
    registered = stubs["vllm.lora.resolver"]["LoRAResolverRegistry"].resolvers
    resolver.register_resolver()
    assert not registered, "the environment names no folder"
    monkeypatch.setenv(resolver.PLACE, str(place))
    for _ in range(2):
        resolver.register_resolver()
    (found,) = registered.values()

    def resolved(name: str, base: str) -> Any:
        return asyncio.run(found.resolve_lora(base, name))

    anna, ben = resolved("anna", "its/base"), resolved("ben", "its/base")
    assert (anna.lora_name, anna.lora_path) == ("anna", str(place / "anna"))
    assert 0 < anna.lora_int_id != ben.lora_int_id > 0
    assert resolved("anna", "its/base").lora_int_id == anna.lora_int_id
    for name in ("lora", "nobody", "inner/anna", "../place/anna", str(place / "anna"), "", ".", "a" * 300):
        assert resolved(name, "its/base") is None
    assert resolved("anna", "another/base") is None


# What reading the code of a9f43f17 found (E1 to E4, E8, E11): every test here fails there.


@pytest.mark.usefixtures("names")
def test_a_weight_whose_inputs_have_a_fixed_scale_is_refused_by_name() -> None:
    layer = Engine().manager.modules["model.layers.0.mlp.down_proj"]
    layer.base_layer.weight = torch.empty(0)
    layer.base_layer.input_scale = torch.tensor(1.0)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.down_proj: its weight can't be read"):
        layer.smoa.weight()


@pytest.mark.usefixtures("names")
def test_layers_of_one_prefix_keep_a_name_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fakes.BaseLinearLayerWithLoRA.__init__

    def without_prefix(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.base_layer.prefix = ""

    monkeypatch.setattr(fakes.BaseLinearLayerWithLoRA, "__init__", without_prefix)
    engine = Engine()
    layers = [layer for layer in engine.manager.modules.values() if hasattr(layer, "smoa")]
    context = engine.config.compilation_config.static_forward_context
    assert len({layer.smoa_name for layer in layers}) == len(layers)
    assert all(context[layer.smoa_name] is layer for layer in layers)


@pytest.mark.usefixtures("names")
def test_a_projection_that_vllm_reads_without_calling_it_is_refused(folder: Path) -> None:
    module: Any = importlib.import_module("smoa.vllm.plugin")
    engine = Engine()
    layer = engine.manager.modules["model.layers.0.self_attn.o_proj"]
    engine.manager.modules["model.layers.0.self_attn.kv_b_proj"] = layer
    places = dict(module._places(engine.manager))
    assert "without calling the layer" in places["model.layers.0.self_attn.kv_b_proj"]
    assert isinstance(places["model.layers.0.self_attn.o_proj"], tuple)
    layer.base_layer.weight = torch.empty(16, 1, 4)  # of Mamba's convolution
    assert "without calling the layer" in dict(module._places(engine.manager))["model.layers.0.self_attn.o_proj"]


@pytest.mark.usefixtures("names")
def test_a_projection_that_vllm_has_in_two_places_is_refused() -> None:
    """Gemma 4's k_proj, where it is v_proj too."""
    module: Any = importlib.import_module("smoa.vllm.plugin")
    engine = Engine()
    stacked = {"layers.0.self_attn.k_proj.": ("layers.0.self_attn.qkv_proj.", ["k", "v"])}
    stacked |= {"layers.0.self_attn.q_proj.": ("layers.0.self_attn.qkv_proj.", "q")}
    engine.manager.model.hf_to_vllm_mapper = SimpleNamespace(orig_to_new_stacked=stacked)
    places = dict(module._places(engine.manager))
    assert "has twice" in places["model.layers.0.self_attn.k_proj"]
    assert isinstance(places["model.layers.0.self_attn.q_proj"], tuple)
    assert isinstance(places["model.layers.1.self_attn.k_proj"], tuple)


@pytest.mark.usefixtures("names")
def test_an_adapter_of_a_model_without_its_head_is_served_where_the_engine_pools(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "anna", tmp_path / "anna")
    file = tmp_path / "anna" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {key.replace("base_model.model.model.", "base_model.model."): each for key, each in tensors.items()}, file
    )
    engine = Engine()
    with pytest.raises(ConfigError, match="no LoRA layer of this engine"):
        engine.load(tmp_path / "anna")
    module: Any = importlib.import_module("smoa.vllm.plugin")
    engine.manager.is_pooling_model = True
    engine.manager.smoa_renamed = module._renaming(engine.manager)
    assert engine.load(tmp_path / "anna").loras.keys() == Engine().load(folder / "anna").loras.keys()


@pytest.mark.usefixtures("names")
def test_a_lora_that_fails_half_way_leaves_nothing_in_its_slot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    layer = engine.manager.modules["model.layers.0.self_attn.qkv_proj"]
    kind: Any = type(layer).__mro__[2]

    def fails(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        self.loras[index] = lora_a
        raise RuntimeError("k has other heads")

    monkeypatch.setattr(kind, "set_lora", fails)
    with pytest.raises(RuntimeError, match="other heads"):
        engine.manager.activate(engine.load(folder / "lora", 3), 0)
    assert not layer.loras


@pytest.mark.usefixtures("names")
def test_a_layer_that_applies_lora_in_its_own_way_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = importlib.import_module("vllm.lora.layers.row_parallel_linear").RowParallelLinearWithLoRA
    monkeypatch.setattr(kind, "_apply_lora_to_output", lambda layer, x, output: output, raising=False)  # as heads do
    with pytest.raises(ConfigError, match=r"adapts model.layers.0.mlp.down_proj \(a RowParallelLinear\)"):
        Engine().load(folder / "anna")


@pytest.mark.parametrize("option", ["compile_mm_encoder", "cudagraph_mm_encoder"])
@pytest.mark.usefixtures("names")
def test_compiled_encoders_are_refused(option: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = importlib.import_module("vllm.config.compilation").CompilationConfig
    monkeypatch.setattr(kind, option, True, raising=False)
    with pytest.raises(ConfigError, match=option):
        Engine().load(folder / "anna")


def test_adapters_of_equal_row_labels_and_other_column_labels_share_no_blocks() -> None:
    first = problem(12, 10, (2, 1))
    rows, cols = first.partition.row_labels, first.partition.col_labels
    second = first._replace(partition=Blocks(rows, 1 - cols, 2))
    layer, x = one_rank([12], first.weight.float()), torch.randn(2, 10)
    for slot, case in enumerate([first, second]):
        layer.set(slot, [part(case)])
    found = added(layer, x, RowsBySlot([0, 1]), 12)
    for row, case in enumerate([first, second]):
        assert_close(found[row], (x[row].double() @ case.oracle("hadamard").T).float())


def test_an_adapter_of_other_labels_is_read_with_its_own(folder: Path, tmp_path: Path) -> None:
    tensors, known = load_file(folder / "anna" / "adapter_model.safetensors"), list[Template]()
    shutil.copy(folder / "anna" / "adapter_config.json", tmp_path)
    base = tiny.build("llama")
    for key in [None, *(key for key in tensors if key.endswith("_labels"))]:
        own = tensors if key is None else tensors | {key: tensors[key].flip(0)}
        save_file(own, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        for path, layer in read_layers(
            str(tmp_path), lambda path: base.get_submodule(path).weight.shape, known
        ).items():
            assert torch.equal(layer.row_labels, own[f"{PREFIX}{path}.smoa_row_labels"])
            assert torch.equal(layer.col_labels, own[f"{PREFIX}{path}.smoa_col_labels"])


@pytest.mark.usefixtures("names")
def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    base = tiny.build("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.up_proj.weight.mul_(0.5)
    get_peft_model(base, SmoaConfig(r=4, target_modules=LINEAR, init_weights=False)).save_pretrained(tmp_path)
    engine = Engine()
    with pytest.raises(AdapterFileError, match=r"up_proj: .*trained on another base.*other_base=True"):
        engine.load(tmp_path)
    engine.load(folder / "anna")
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"peft_type"', '"other_base": true, "peft_type"'))
    engine.load(tmp_path)


@pytest.mark.parametrize("change", [lambda tensor: tensor[:-1], None], ids=["another shape", "left out"])
def test_a_tensor_that_lacks_or_does_not_fit_its_layer_is_named(change: Any, folder: Path, tmp_path: Path) -> None:
    tensors, base = load_file(folder / "anna" / "adapter_model.safetensors"), tiny.build("llama")
    shutil.copy(folder / "anna" / "adapter_config.json", tmp_path)
    key = next(key for key in tensors if key.endswith("smoa_A.weight"))
    changed = {name: tensor for name, tensor in tensors.items() if name != key}
    save_file(changed | ({key: change(tensors[key])} if change else {}), tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=re.escape(key.removeprefix(PREFIX))):
        read_layers(str(tmp_path), lambda path: base.get_submodule(path).weight.shape, [])
