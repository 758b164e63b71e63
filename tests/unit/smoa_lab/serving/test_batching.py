"""transformers' continuous batching over a pool: each request answers as its adapter alone does."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from smoa import AdapterPool
from smoa.errors import AdapterFileError, ConfigError
from tests.support import adapters
from tests.support.adapters import base, saved
from tests.support.tiny_models import VOCAB_SIZE

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("transformers", minversion="5.24")
from transformers import ContinuousBatchingConfig, GenerationConfig

from smoa_lab.serving.batching import PoolManager, running

KINDS: dict[str, dict[str, Any]] = {
    **adapters.KINDS,
    "fay": {"r": 4, "num_blocks": 2, "target_modules": ["v_proj", "lm_head"]},
    "gus": {"r": 16, "num_blocks": 2, "target_modules": ["q_proj", "up_proj"]},  # forms ΔW for few tokens already
}
NEW = 6
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
SMALL: dict[str, Any] = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("adapters"), KINDS, alpha=40)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 20, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Alone:
    """What PEFT generates with one adapter, computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models, self.answers = folder, dict[str, Any](), dict[Any, list[int]]()

    def __call__(self, name: str, tokens: list[int]) -> list[int]:
        if name not in self.models:
            model = base()
            self.models[name] = model if name == "__base__" else PeftModel.from_pretrained(model, self.folder / name)
        key = name, tuple(tokens)
        if key not in self.answers:
            ids = torch.tensor([tokens])
            output = self.models[name].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY
            )
            self.answers[key] = output[0, len(tokens) :].tolist()
        return self.answers[key]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    return Alone(folder)


@pytest.fixture
def pool(folder: Path) -> AdapterPool:
    return AdapterPool(base(), folder=folder)


def started(pool: AdapterPool, **settings: Any) -> AbstractContextManager[PoolManager]:
    return running(pool, GREEDY, ContinuousBatchingConfig(**(SMALL | settings)))


def generated(pool: AdapterPool, inputs: list[list[int]], names: list[str], **settings: Any) -> list[list[int]]:
    with started(pool, **settings) as manager:
        for number, (tokens, name) in enumerate(zip(inputs, names, strict=True)):
            manager.add_request(tokens, str(number), adapter=name)
        outputs = {output.request_id: output for output in (manager.get_result(timeout=60) for _ in inputs)}
    return [outputs[str(number)].generated_tokens for number in range(len(inputs))]


NAMES = [*KINDS, "__base__"]
REQUESTS = [(name, prompt(length, length)) for length in (3, 9, 17) for name in NAMES]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"allow_block_sharing": False},
        {"max_batch_tokens": 8},  # prompts are read in chunks
        {"num_blocks": 12},  # more requests than there is room for
    ],
    ids=str,
)
def test_each_request_answers_as_its_adapter_alone(pool: AdapterPool, alone: Alone, settings: dict[str, Any]) -> None:
    names, inputs = [name for name, _ in REQUESTS], [tokens for _, tokens in REQUESTS]
    expected = [alone(name, tokens) for name, tokens in REQUESTS]
    assert generated(pool, inputs, names, **settings) == expected
    assert len({tuple(answer) for answer in expected}) > len(NAMES)  # they differ
    for name in KINDS:
        pool.unload(name)  # nothing is in use


def test_no_adapter_sees_what_another_has_computed(pool: AdapterPool, alone: Alone) -> None:
    tokens = prompt(21)
    with started(pool) as manager:
        shared = []
        cache: Any = manager.batch_processor.cache
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda *args: shared.append(search(*args)) or shared[-1]
        for name in [*NAMES, *NAMES]:  # one after the other, so that each finds the blocks of those before
            manager.add_request(tokens, adapter=name)
            assert manager.get_result(timeout=60).generated_tokens == alone(name, tokens)
    assert shared == [0] * len(NAMES) + [20] * len(NAMES)


def test_after_a_step_of_training_nothing_of_before_is_used(folder: Path) -> None:
    pool = AdapterPool(base(), folder=folder)
    pool.load("anna", folder / "anna")
    tokens = prompt(12)
    with started(pool) as manager:
        every_b = pool.parameters()[1::2]
        manager.add_request(tokens, adapter="anna")
        before = manager.get_result(timeout=60).generated_tokens
        with torch.no_grad():
            for part in every_b:
                part.neg_()
        manager.add_request(tokens, adapter="anna")
        after = manager.get_result(timeout=60).generated_tokens
        assert after != before
        assert after == generated(pool, [tokens], ["anna"])[0]


def test_an_adapter_in_use_stays_and_a_canceled_request_frees_it(folder: Path, alone: Alone) -> None:
    pool = AdapterPool(base(), slots=1, folder=folder)
    with started(pool) as manager:
        manager.add_request(prompt(5), "long", max_new_tokens=200, adapter="anna", streaming=True)
        assert manager.get_result(timeout=60).request_id == "long"
        for change in (
            lambda: pool.unload("anna"),
            lambda: pool.load("anna", folder / "ben"),
            lambda: pool.load("ben", folder / "ben"),
            lambda: manager.add_request(prompt(5), adapter="ben"),
            pool.close,
        ):
            with pytest.raises(ConfigError, match="in use"):
                change()
        with pytest.raises(ConfigError, match="runs already"):
            manager.add_request(prompt(5), "long")
        manager.cancel_request("long")
        deadline = threading.Event()
        while pool._in_use["anna"]:
            assert not deadline.wait(0.01)
        manager.add_request(prompt(5), "next", adapter="ben")
        while (output := manager.get_result(timeout=60)).request_id != "next":
            pass
        assert output.generated_tokens == alone("ben", prompt(5))
        pool.unload("ben")  # an answer that is seen holds nothing


def test_a_request_that_comes_while_ended_ones_are_looked_for_keeps_its_adapter(pool: AdapterPool) -> None:
    manager = PoolManager(pool, GREEDY, ContinuousBatchingConfig(**SMALL))

    class Arriving(dict[str, Any]):
        def __iter__(self) -> Iterator[str]:
            manager.add_request(prompt(5), "new", adapter="anna")
            return super().__iter__()

    manager._processor.scheduler.active_requests = Arriving()
    manager.release_ended()
    assert (manager.lease("new").name, pool._in_use["anna"]) == ("anna", 1)


def test_another_thread_may_use_the_pool_within_a_step(pool: AdapterPool, alone: Alone) -> None:
    ids, found = torch.tensor([prompt(7)]), []

    def use() -> None:
        with pool.use(["ben"]):
            output = pool.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY)
        found.append(output[0, 7:].tolist())

    def within(*_: Any) -> None:
        if threading.current_thread() is not other:
            handle.remove()
            other.start()
            other.join()

    other = threading.Thread(target=use)
    handle = pool.base.model.layers[0].register_forward_pre_hook(within)
    assert generated(pool, [prompt(9)], ["anna"]) == [alone("anna", prompt(9))]
    assert found == [alone("ben", prompt(7))]
    assert not hasattr(pool.base.config, "is_causal")


def test_each_request_may_have_a_generation_config(pool: AdapterPool, alone: Alone, folder: Path) -> None:
    tokens = prompt(6)
    banned = alone("anna", tokens)[0]
    hot = GenerationConfig(do_sample=True, temperature=5.0)
    without = GenerationConfig(do_sample=False, sequence_bias={(banned,): float("-inf")})
    model = PeftModel.from_pretrained(base(), folder / "anna")
    ids = torch.tensor([tokens])
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "bad_words_ids": [[banned]]}
    avoiding = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    with started(pool) as manager:
        for request in ("a", "b", "c"):
            seed = {"a": 1, "b": 1, "c": 2}[request]
            manager.add_request(tokens, f"hot {request}", adapter="anna", generation_config=hot, seed=seed)
        manager.add_request(tokens, "without", adapter="anna", generation_config=without)
        manager.add_request(tokens, "greedy", adapter="anna")
        short = GenerationConfig(do_sample=False, max_new_tokens=2)
        manager.add_request(tokens, "short", adapter="anna", generation_config=short)
        found = {
            output.request_id: output.generated_tokens for output in (manager.get_result(timeout=60) for _ in range(6))
        }
    assert found["greedy"] == alone("anna", tokens)
    assert found["short"] == alone("anna", tokens)[:2]
    assert found["without"] == avoiding[0, 6:].tolist()
    assert found["hot a"] == found["hot b"] != found["hot c"]


def test_a_request_whose_token_cannot_be_chosen_ends_alone(pool: AdapterPool, alone: Alone) -> None:
    overflows = GenerationConfig(do_sample=True, temperature=1e-40)
    with started(pool) as manager:
        manager.add_request(prompt(5), "before", adapter="anna")
        manager.add_request(prompt(6), "fails", adapter="ben", generation_config=overflows, streaming=True)
        manager.add_request(prompt(7), "after", adapter="ben")
        found = {output.request_id: output for output in (manager.get_result(timeout=60) for _ in range(3))}
        assert "probability" in found["fails"].error
        assert found["before"].generated_tokens == alone("anna", prompt(5))
        assert found["after"].generated_tokens == alone("ben", prompt(7))
        pool.unload("ben")
        for bias in ({(VOCAB_SIZE,): 1.0}, {(-1,): 1.0}):
            with pytest.raises(ConfigError, match="generation_config"):
                manager.add_request(prompt(5), adapter="anna", generation_config=GenerationConfig(sequence_bias=bias))
        pool.unload("anna")


def test_what_cannot_be_served_is_refused_before_work_starts(
    pool: AdapterPool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool.base, "forward", lambda **_: pytest.fail("work was started"))
    with pytest.raises(ConfigError, match="'anne'; did you mean 'anna'"):
        generated(pool, [prompt(4)], ["anne"])
    shutil.copytree(folder / "anna", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(AdapterFileError, match="broken"):
        generated(AdapterPool(base(), folder=tmp_path), [prompt(4)], ["broken"])


def test_a_failure_of_the_thread_that_computes_is_an_error_and_frees_the_adapters(
    pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pool.base, "forward", broken)
    with started(pool) as manager:
        manager.add_request(prompt(4), adapter="anna")
        assert "out of memory" in manager.get_result(timeout=60).error
        manager.stop(hard_stop=True)
        assert "out of memory" in str(manager.background_thread_status.fatal_error)
    pool.unload("anna")
