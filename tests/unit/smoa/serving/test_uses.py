"""A call of a pool's base has the adapters of the `use` around it, or there is an error: never those of another."""

import asyncio
import contextvars
import copy
import gc
import io
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from smoa import AdapterPool
from smoa.errors import ConfigError, UnsupportedModuleError
from tests.support.adapters import base, config, saved
from tests.support.tolerance import assert_close

NAMES = ("anna", "ben")
IDS = torch.randint(3, 20, (1, 5), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def said(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters"), {name: {"r": 4} for name in NAMES})


class Known:
    """Tells which adapter a model computes as."""

    def __init__(self, folder: Path) -> None:
        self.of = {name: said(PeftModel.from_pretrained(base(), str(folder / name))) for name in NAMES}
        self.of["base"] = said(base())

    def __call__(self, model: Any) -> str:
        logits = said(model)
        (name,) = [name for name, known in self.of.items() if torch.allclose(logits, known, atol=1e-5)]
        return name


@pytest.fixture(scope="module")
def computes_as(folder: Path) -> Known:
    return Known(folder)


# Streams, tasks and threads.


def stream(pool: AdapterPool, name: str, computes_as: Known, steps: int = 3) -> Iterator[str]:
    with pool.use([name]):
        for _ in range(steps):
            yield computes_as(pool.base)


def test_interleaved_streams_are_refused_and_never_get_anothers_adapter(folder: Path, computes_as: Known) -> None:
    pool = AdapterPool(base(), folder=folder)
    first, second = (stream(pool, name, computes_as) for name in NAMES)
    assert (next(first), next(second)) == NAMES
    with pytest.raises(ConfigError, match="suspended inside `use`"):
        next(first)
    assert list(second) == ["ben", "ben"]
    assert computes_as(pool.base) == "base"
    pool.close()


def test_a_call_beside_a_suspended_stream_is_refused(folder: Path, computes_as: Known) -> None:
    pool = AdapterPool(base(), folder=folder)
    suspended = stream(pool, "anna", computes_as)
    next(suspended)
    with pytest.raises(ConfigError, match="suspended"):
        said(pool.base)
    with pool.use(["ben"]):
        assert computes_as(pool.base) == "ben"
        with pytest.raises(ConfigError, match="suspended"):
            next(suspended)
    assert computes_as(pool.base) == "base"


def test_a_stream_whose_steps_have_contexts_of_their_own_is_refused(folder: Path, computes_as: Known) -> None:
    pool = AdapterPool(base(), folder=folder)
    steps = stream(pool, "anna", computes_as)
    assert contextvars.copy_context().run(next, steps) == "anna"
    with pytest.raises(ConfigError, match="opened in another context"):
        contextvars.copy_context().run(next, steps)
    pool.unload("anna")


@pytest.mark.parametrize("other", [contextvars.Context, contextvars.copy_context])
def test_a_use_that_is_left_in_another_context_is_closed_with_an_error(
    other: Any, folder: Path, computes_as: Known
) -> None:
    def opens() -> Iterator[None]:
        with pool.use(["anna"]):
            yield

    pool = AdapterPool(base(), folder=folder)
    steps = opens()
    next(steps)
    with pytest.raises(ConfigError, match="left in another context"):
        other().run(next, steps, None)
    assert computes_as(pool.base) == "base"
    pool.unload("anna")


def test_one_left_out_of_order_is_closed_with_an_error(folder: Path, computes_as: Known) -> None:
    pool = AdapterPool(base(), folder=folder)
    first, second = pool.use(["anna"]), pool.use(["ben"])
    first.__enter__()
    second.__enter__()
    with pytest.raises(ConfigError, match="opened after it"):
        first.__exit__(None, None, None)
    assert computes_as(pool.base) == "ben"
    second.__exit__(None, None, None)
    assert computes_as(pool.base) == "base"


def test_two_right_ways_to_stream(folder: Path, computes_as: Known) -> None:
    def by_step(name: str) -> Iterator[str]:
        for _ in range(3):
            with pool.use([name]):
                found = computes_as(pool.base)
            yield found

    pool = AdapterPool(base(), folder=folder)
    assert list(zip(*map(by_step, NAMES), strict=True)) == [NAMES] * 3
    found: dict[str, list[str]] = {}
    threads = [
        threading.Thread(target=lambda name: found.update({name: list(stream(pool, name, computes_as))}), args=(name,))
        for name in NAMES
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [name] * 3 for name in NAMES}


def test_tasks_do_not_meet_and_one_that_outlives_its_use_is_refused(folder: Path, computes_as: Known) -> None:
    pool = AdapterPool(base(), slots=2, folder=folder)

    async def request(name: str) -> list[str]:
        found = []
        with pool.use([name]):
            for _ in range(3):
                found.append(computes_as(pool.base))
                await asyncio.sleep(0)
            found.append(await asyncio.to_thread(computes_as, pool.base))
        return found

    async def late() -> str:
        await asyncio.sleep(0.01)
        return computes_as(pool.base)

    async def main() -> None:
        assert await asyncio.gather(*map(request, NAMES)) == [[name] * 4 for name in NAMES]
        with pool.use(["anna"]):
            task = asyncio.create_task(late())
        pool.unload("anna")
        with pytest.raises(ConfigError, match="after its `use` has ended"):
            await task

    asyncio.run(main())


def test_pools_of_two_models_work_side_by_side(folder: Path, computes_as: Known) -> None:
    student, teacher = (AdapterPool(base(), folder=folder) for _ in range(2))
    with student.use(["anna"]), teacher.use(["ben"]):
        assert (computes_as(student.base), computes_as(teacher.base)) == NAMES
    with teacher.use(["ben"]), student.use(["anna"]):
        assert (computes_as(student.base), computes_as(teacher.base)) == NAMES


def test_a_base_has_one_pool_at_a_time(folder: Path, computes_as: Known) -> None:
    model = base()
    first = AdapterPool(model, folder=folder)
    first.load("anna", folder / "anna")
    with pytest.raises(ConfigError, match="has a pool, with 1 adapters; close that one first"):
        AdapterPool(model)
    with pytest.raises(ConfigError, match="has a pool"):
        AdapterPool(model.model)
    first.close()
    second = AdapterPool(model, folder=folder)
    with second.use(["ben"]):
        assert computes_as(model) == "ben"
    del second
    gc.collect()
    assert computes_as(model) == "base"
    AdapterPool(model)


# Rows.


class Tower(nn.Module):
    """Packs the patches of all samples into one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, *samples: Tensor) -> Any:
        return self.proj(torch.cat(samples))


@pytest.mark.parametrize(("names", "sizes"), [(["a", "b"], [1, 3]), (["a", "b"], [2, 2]), (["a"], [1, 1])], ids=str)
def test_rows_that_are_not_the_samples_are_refused_by_layer(names: list[str], sizes: list[int]) -> None:
    pool = AdapterPool(Tower())
    for name in ("a", "b"):
        pool.add(name, config(target_modules=["proj"]))
    with pool.use(names), pytest.raises(ConfigError, match=f"{len(names)} names, but proj is given {sum(sizes)} rows"):
        pool.base(*(torch.randn(size, 16) for size in sizes))


@pytest.mark.parametrize("names", [[], "anna", [None], [0]], ids=str)
def test_names_that_are_no_list_of_names_are_refused(names: Any, folder: Path) -> None:
    pool = AdapterPool(base(), folder=folder)
    with pytest.raises(ConfigError, match=r"names is .*; give a list that names"), pool.use(names):
        pass


def test_a_layer_at_two_places_is_refused() -> None:
    model = Tower()
    model.again = model.proj
    with pytest.raises(UnsupportedModuleError, match="proj stands at 2 places"):
        AdapterPool(model).add("a", config(target_modules=["proj"]))


def test_experts_that_are_modules_are_refused(tmp_path: Path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    get_peft_model(Experts(), config(target_modules=["experts.1"])).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModuleError, match=r"experts\.1 is an expert"):
        AdapterPool(Experts()).load("a", tmp_path)


# Training.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside", "under another", "under another that computed"])
def test_a_checkpoint_that_computes_again_elsewhere_is_refused(reentrant: bool, where: str) -> None:
    def gradients(checkpoints: bool) -> list[Tensor]:
        model = base().train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        pool = AdapterPool(model)
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            pool.add(name, config())
        factors = pool.parameters()
        with pool.use(["anna"]):
            loss = model(input_ids=IDS).logits.square().sum()
            if where == "inside":
                loss.backward()
        with pool.use(["ben"]):
            if where.endswith("computed"):
                model(input_ids=IDS).logits.sum()
            if where.startswith("under"):
                loss.backward()
        if where == "outside":
            loss.backward()
        return [factor.grad for factor in factors if factor.grad is not None]

    expected = gradients(checkpoints=False)  # which recomputes nothing, and works anywhere
    assert expected
    if where == "inside":
        for found, known in zip(gradients(checkpoints=True), expected, strict=True):
            assert_close(found, known)
    else:
        with pytest.raises((ConfigError, CheckpointError)):
            gradients(checkpoints=True)


def test_a_checkpoint_of_the_bare_base_is_refused_inside_a_use() -> None:
    model = Tower()
    pool = AdapterPool(model)
    pool.add("a", config(target_modules=["proj"]))
    x = torch.randn(1, 16, requires_grad=True)
    outside = checkpoint(model, x, use_reentrant=True).sum()
    with pool.use(["a"]), pytest.raises(ConfigError, match="another `use`"):
        outside.backward()


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_an_evaluation_around_training_sees_each_step(optimizer: str, tmp_path: Path) -> None:
    model = base()
    pool = AdapterPool(model)
    pool.add("anna", config())
    factors = pool.parameters()
    step = torch.optim.SGD(factors, 1e-3) if optimizer == "sgd" else torch.optim.AdamW(factors, 1e-3, fused=True)
    with pool.use(["anna"]):
        for _ in range(2):
            said(model)
            with pool.use(["anna"]):
                model(input_ids=IDS).logits.square().sum().backward()
                said(model)
                step.step()
            inside = said(model)
            step.zero_grad()
            with pool.use(["anna"]):
                fresh = said(model)
            assert torch.equal(inside, fresh)
    pool.save("anna", tmp_path)
    assert_close(said(PeftModel.from_pretrained(base(), str(tmp_path))), inside)


# Copies, and PEFT beside it.


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "average"])
def test_a_base_with_a_pool_can_be_copied(way: str, folder: Path, computes_as: Known) -> None:
    model = base()
    pool = AdapterPool(model, folder=folder)
    with pool.use(["anna"]):
        if way == "average":
            copied = torch.optim.swa_utils.AveragedModel(model).module
        elif way == "torch.save":
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        else:
            copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert (computes_as(model), computes_as(copied)) == ("anna", "base")
    with AdapterPool(copied, folder=folder).use(["ben"]):
        assert computes_as(copied) == "ben"
    assert pickle.loads(pickle.dumps(type(model).generate)) is type(model).generate


def test_a_base_that_peft_has_adapted_is_refused(folder: Path) -> None:
    model = base()
    pool = AdapterPool(model, folder=folder)
    pool.load("anna", folder / "anna")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    refused = pytest.raises(UnsupportedModuleError, match=r"without PEFT, which has adapted .*q_proj")
    with refused:
        pool.load("ben", folder / "ben")
    with refused, pool.use(["anna"]):
        pass
    pool.close()
    with refused:
        AdapterPool(model)


def test_a_base_whose_layer_was_replaced_is_refused(folder: Path) -> None:
    pool = AdapterPool(base(), folder=folder)
    pool.load("anna", folder / "anna")
    attention = pool.base.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    with pytest.raises(UnsupportedModuleError, match=r"layers.0.self_attn.q_proj was replaced"), pool.use(["anna"]):
        pass
