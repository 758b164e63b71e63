"""transformers' continuous batching over a pool, with an adapter for each request and its own generation config.

The manager computes in a thread of its own, which is why a step names its adapters there.
"""

from __future__ import annotations

import copy
import math
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

from smoa import AdapterPool
from smoa.errors import ConfigError
from smoa.serving.groups import LoadedAdapter, new_number
from smoa.serving.uses import Batch, Diagonals
from smoa.tuner.generation import BASE


class Step(Batch):
    """The adapter of each token of a step, in which tokens of all requests are packed. ``last`` has each request's
    token that gets logits: a layer may be given these alone."""

    def __init__(self, adapters: Sequence[LoadedAdapter | None], last: Sequence[int], diagonals: Diagonals) -> None:
        super().__init__(adapters, diagonals)
        self.last = last

    def by_row(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2)

    def adapters_of(self, count: int, path: str) -> Sequence[LoadedAdapter | None]:
        """The adapter of each token, or of each one that has logits."""
        if count == len(self.adapters):
            return self.adapters
        if count == len(self.last):
            return [self.adapters[token] for token in self.last]
        found = f"is given {count} tokens of a step of {len(self.adapters)}"
        raise ConfigError(f"AdapterPool: {path} {found}; its model can't be served by continuous batching")


@dataclass(eq=False)
class Lease:
    """A request's adapter, and how its next token is chosen where not by the greatest logit. ``queued``: whether
    transformers has the request, or had it. ``number``: no other lease or adapter has it."""

    name: str
    adapter: LoadedAdapter | None
    chooses: Chooser | None = None
    queued: bool = False
    number: int = field(default_factory=new_number)


@dataclass(eq=False)
class Chooser:
    """Chooses a request's next token as its own generation config says. ``stops``: whether it ends with these."""

    processors: LogitsProcessorList
    samples: bool
    generator: torch.Generator
    stops: Callable[[list[int]], bool] | None = None

    def __call__(self, tokens: list[int], scores: Tensor) -> Tensor:
        """The logits (vocabulary,) as they were processed; if it samples, all but the sampled one are -inf."""
        before: Any = torch.tensor([tokens], device=scores.device)
        processed: Tensor = self.processors(before, scores[None])[0]
        if not self.samples:
            return processed
        token = torch.multinomial(processed.softmax(-1), 1, generator=self.generator)
        return torch.full_like(processed, -math.inf).index_fill(0, token, 0)


class _Choosers(ContinuousBatchingLogitsProcessor):
    """The choosers of a step's requests, by which the manager's greatest logit is each one's own choice."""

    supported_kwargs, ignored_kwargs = dict[str, type](), ()

    def __init__(self, manager: PoolManager) -> None:
        self._manager, self._states = manager, list[Any]()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        self._states = [future.state for future in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, state in enumerate(self._states):
            chooses = self._manager.lease(state.request_id).chooses
            if chooses is not None:
                try:
                    scores[row] = chooses(state.initial_tokens + state.generated_tokens, scores[row])
                    if chooses.stops is not None:
                        written = state.to_generation_output().generated_tokens
                        if chooses.stops([*written, int(scores[row].argmax())]):
                            state._new_tokens_limit = state.generated_len() + 1
                except Exception as error:  # ends this request only
                    self._manager.failed[state.request_id] = state, error
        return scores


class _Router(OutputRouter):
    """Frees the adapters of requests that have ended before their answers are seen."""

    def __init__(self, manager: PoolManager) -> None:
        super().__init__()
        self._manager = manager

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._manager.release_ended()
        super().deliver_batch([output for output in outputs if output.request_id not in self._manager.failed])


class PoolManager(ContinuousBatchingManager):
    """transformers' manager, with an adapter of a pool for each request.

    An adapter stays in its slot until its last request has ended. No request sees keys and values that another adapter
    has computed. ``generation_config`` is for requests that bring none; CUDA graphs are off.
    """

    def __init__(
        self,
        pool: AdapterPool,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
    ) -> None:
        config = copy.copy(continuous_batching_config)
        config.use_cuda_graph, config.use_async_batching = False, False
        ends = generation_config.eos_token_id
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=generation_config.max_new_tokens,
            eos_token_id=-1 if ends is None else ends,  # as transformers has it
        )
        model: Any = pool.base
        super().__init__(model, greedy, config)
        self._pool, self._leases, self._lease_lock = pool, dict[str, Lease](), threading.Lock()
        self._default = generation_config
        self.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Choosers(self)]))
        self.logit_processor.tensors_required = 1
        self.failed: dict[str, tuple[Any, Exception]] = {}
        self._diagonals = Diagonals()
        self._step: tuple[Any, Step] | None = None
        self.output_router = _Router(self)
        self.batch_processor = self._create_batch_processor()  # now, so that a lack of memory is an error here
        self.capacity: int = self._processor.cache.num_blocks * self.continuous_batching_config.page_size

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        adapter: str = BASE,
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        stops: Callable[[list[int]], bool] | None = None,
        **kwargs: Any,
    ) -> str | None:
        """As transformers' own, with the name of an adapter that is loaded or in the pool's folder, and a generation
        config: how tokens are chosen. The same seed samples the same tokens. The answer ends with the token for which
        ``stops`` is true of all that are written.

        Raises:
            ConfigError: there is no such adapter, all slots are in use by other adapters, a request of this name
                runs, or its generation config or seed can't be used.
            AdapterFileError: the adapter is damaged.
        """
        own = generation_config or self._default
        if max_new_tokens is None:
            max_new_tokens = own.max_new_tokens or self.generation_config.max_new_tokens
        tokens, request_id = list(map(int, input_ids)), request_id or uuid.uuid4().hex
        chooses = self._chooser(own, tokens, seed, stops)
        lease = Lease(adapter, self._pool.hold(adapter), chooses)
        with self._lease_lock:
            if self._leases.setdefault(request_id, lease) is not lease:
                self._pool.release([adapter])
                raise ConfigError(f"add_request: a request {request_id!r} runs already; choose another request_id")
        added: str | None = None
        try:
            added = super().add_request(tokens, request_id, max_new_tokens, *args, **kwargs)
        finally:
            lease.queued = True
            if added is None:
                self._end([request_id])
        return added

    def _chooser(self, config: GenerationConfig, tokens: Sequence[int], seed: int | None, stops: Any) -> Chooser | None:
        generator = torch.Generator(self.model.device)
        scores = torch.zeros(self.model.config.get_text_config().vocab_size, device=self.model.device)
        try:
            chooses = Chooser(self.model._get_logits_processor(config), bool(config.do_sample), generator, stops)
            chooses(list(tokens), scores)  # once, to find here what is wrong with the config
            generator.manual_seed(seed) if seed is not None else generator.seed()
        except Exception as error:
            raise ConfigError(f"add_request: generation_config and seed can't be used: {error}") from error
        return chooses if chooses.samples or chooses.processors or stops else None

    def release_ended(self, everything: bool = False) -> None:
        """Free the adapters of requests that have ended, or been canceled; called by the thread that computes."""
        queued = [name for name, lease in list(self._leases.items()) if lease.queued]  # first: others add requests
        alive = set[str]()
        if not everything:
            with self.input_queue.mutex:
                alive = {state.request_id for state in self.input_queue.queue}
            scheduler = self._processor.scheduler
            alive.update(scheduler.active_requests, scheduler.waiting_requests)
        self._end([name for name in queued if name not in alive])

    def _end(self, requests: Sequence[str]) -> None:
        with self._lease_lock:
            self._pool.release([self._leases.pop(request).name for request in requests if request in self._leases])

    def _salted(self, request_id: str, tokens: list[int]) -> list[int]:
        """The tokens, the first of them changed by the adapter: transformers knows cached blocks by their tokens and
        all those before. Factors that are trained change between requests, so these share nothing."""
        lease = self.lease(request_id)
        salt = 0 if lease.adapter is None else lease.number if lease.adapter.group.fixed else lease.adapter.number
        return [token ^ (salt >> 11 * place & 0x7FF) << 20 for place, token in enumerate(tokens[:4])] + tokens[4:]

    def _create_batch_processor(self) -> Any:
        processor: Any = super()._create_batch_processor()
        if processor is not self.batch_processor:
            self._processor = processor
            cache: Any = processor.cache
            cache.search_prefix_match = self._with_salt(cache.search_prefix_match)
            for allocator in cache.cache_allocators.values():
                allocator.mark_complete_blocks = self._with_salt(allocator.mark_complete_blocks)
            inputs: Any = processor.inputs_and_outputs
            inputs.get_model_kwargs = _without_is_causal(inputs.get_model_kwargs)
        return processor

    def _with_salt(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda request_id, tokens, *args: original(request_id, self._salted(request_id, tokens), *args)

    def lease(self, request_id: str) -> Lease:
        return self._leases[request_id]

    def _generation_loop_body(self, *args: Any, **kwargs: Any) -> bool:
        goes_on: bool = super()._generation_loop_body(*args, **kwargs)
        for request in self.failed:
            self._processor.scheduler.finish_request(request)
        self.release_ended()
        while self.failed:
            self.output_router.fail_and_deliver(*self.failed.popitem()[1])
        return goes_on

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_generation_loop(*args, **kwargs)
        finally:
            self.release_ended(everything=True)

    def _generation_step(self) -> None:
        requests = self._processor.inputs_and_outputs.requests_in_batch
        adapters = [self.lease(future.state.request_id).adapter for future in requests]
        lengths = [future.query_length for future in requests]
        key = [id(adapter) for adapter in adapters], lengths
        if self._step is None or self._step[0] != key:
            tokens = [adapter for adapter, length in zip(adapters, lengths, strict=True) for _ in range(length)]
            ends = torch.tensor(lengths).cumsum(0).sub_(1).tolist()
            last = [end for end, future in zip(ends, requests, strict=True) if future.has_new_token]
            last += [0] * (len(requests) - len(last))  # as transformers pads them
            self._step = key, Step(tokens, last, self._diagonals)
        with self._pool.computing(self._step[1]):
            super()._generation_step()


def _without_is_causal(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The arguments of a step without `is_causal`. transformers writes it into the model's config while a step runs, so
    that another thread's forward would attend to later tokens, and could leave it there for good. The step has masks,
    or needs the default."""
    return lambda *args, **options: {
        name: value for name, value in original(*args, **options).items() if name != "is_causal"
    }


@contextmanager
def running(
    pool: AdapterPool, generation_config: GenerationConfig, continuous_batching_config: ContinuousBatchingConfig
) -> Iterator[PoolManager]:
    """A manager that takes requests and computes until the context ends."""
    manager = PoolManager(pool, generation_config, continuous_batching_config)
    manager.start()
    try:
        yield manager
    except BaseException:
        manager.stop(hard_stop=True)
        raise
    else:
        manager.stop()
    finally:
        manager.destroy()
        manager.release_ended(everything=True)
