"""All of transformers' server and continuous batching that `smoa serve` replaces or reads.

Little of it is a public interface, so each name is checked before anything is loaded.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from typing import Any

import transformers

from smoa.errors import UnsupportedVersionError, first_of

TRIED = ("5.24.0",)
"""Versions of transformers that the tests passed with."""
BATCHING, SERVING = "transformers.generation.continuous_batching", "transformers.cli.serving"
NAMES: dict[str, tuple[str, ...]] = {
    # takes requests, in a thread of its own that computes; a step names its adapters there
    f"{BATCHING}.continuous_api:ContinuousBatchingManager": (
        *("batch_processor", "output_router", "input_queue", "logit_processor", "background_thread_status", "model"),
        *("start", "stop", "destroy", "cancel_request", "register_result_handler", "_request_counter"),
        *("_generation_step", "_generation_loop_body", "_run_generation_loop", "_create_batch_processor"),
    ),
    f"{BATCHING}.continuous_api:ContinuousBatchingManager.add_request": ("input_ids", "request_id", "max_new_tokens"),
    f"{BATCHING}.continuous_api:BackgroundThreadStatus": ("fatal_error",),
    # frees an adapter before its last answer is seen
    f"{BATCHING}.continuous_api:OutputRouter": ("result_handlers", "_lock"),
    f"{BATCHING}.continuous_api:OutputRouter.deliver_batch": ("outputs",),
    f"{BATCHING}.continuous_api:OutputRouter.fail_and_deliver": ("state", "error"),
    # which requests live, and which are in a step, with how many tokens
    f"{BATCHING}.continuous_api:ContinuousBatchProcessor": ("cache", "scheduler", "inputs_and_outputs"),
    f"{BATCHING}.scheduler:Scheduler": ("active_requests", "waiting_requests"),
    f"{BATCHING}.scheduler:Scheduler.finish_request": ("request_id",),
    f"{BATCHING}.input_outputs:ContinuousBatchingIOs": ("requests_in_batch", "get_model_kwargs"),
    f"{BATCHING}.requests:FutureRequestState": ("state", "query_length", "has_new_token"),
    f"{BATCHING}.requests:GenerationOutput": ("request_id", "generated_tokens"),
    # ends a request
    f"{BATCHING}.requests:RequestState": (
        *("request_id", "initial_tokens", "generated_tokens", "_new_tokens_limit", "generated_len"),
        "to_generation_output",
    ),
    # keeps cached blocks apart by adapter
    f"{BATCHING}.cache:PagedAttentionCache": ("cache_allocators", "num_blocks"),
    f"{BATCHING}.cache:PagedAttentionCache.search_prefix_match": ("request_id", "prompt_ids"),
    f"{BATCHING}.cache_allocators:CacheAllocator.mark_complete_blocks": ("request_id",),
    # lets each request have a generation config
    f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessor": ("supported_kwargs", "ignored_kwargs"),
    f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessor.fill_defaults": ("int32_tensor",),
    f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessor.prepare_tensor_args": (
        "requests_with_new_token",
    ),
    f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList": ("tensors_required",),
    "transformers:GenerationMixin": ("_get_logits_processor",),
    # the app, without the routes that load another model
    f"{SERVING}.server:build_server": (),
    f"{SERVING}.model_manager:ModelManager": ("list_models", "shutdown"),
    f"{SERVING}.utils:GenerationState": ("is_cb_alive",),
    f"{SERVING}.utils:GenerationState.get_manager": ("model_id", "use_cb"),
    f"{SERVING}.utils:CBGenerateManager": ("_cb", "generate_streaming", "generate_non_streaming"),
    f"{SERVING}.utils:CBGenerateManager.init_cb": ("model", "gen_config"),
    f"{SERVING}.utils:CBWorkerDeadError": (),
    f"{SERVING}.utils:get_response_template": ("processor", "model"),
    # reads a request, for the adapter that it names
    f"{SERVING}.utils:BaseHandler": ("model_manager",),
    f"{SERVING}.utils:BaseHandler._resolve_model": ("body",),
    f"{SERVING}.utils:BaseHandler._build_generation_config": ("body",),
    f"{SERVING}.chat_completion:ChatCompletionHandler.handle_request": ("body", "request_id"),
    f"{SERVING}.completion:CompletionHandler.handle_request": ("body", "request_id"),
}
"""What has to be there: a class with these attributes, or a function with these parameters."""


def check() -> None:
    """Raise UnsupportedVersionError if this transformers lacks a name; ModuleNotFoundError if a package is missing."""
    for package in ("fastapi", "openai", "uvicorn"):  # without them transformers' modules fail by a NameError
        importlib.import_module(package)
    lacking = [name if part is None else f"{name} with {part}" for name in NAMES for part in _lacking(name)]
    if lacking:
        raise UnsupportedVersionError(
            f"smoa serve: transformers {transformers.__version__} lacks {first_of(lacking)}; it was tried with "
            f"transformers {' and '.join(TRIED)}"
        )


def _lacking(name: str) -> list[str | None]:
    """Attributes of a class, or parameters of a function, that are not there; None stands for all of it."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("transformers"):
            raise
        return [None]
    if not isinstance(found, type):
        known = set(inspect.signature(found).parameters)
    else:
        methods = (method for own in found.__mro__ for method in vars(own).values() if inspect.isfunction(method))
        steps = (step for method in methods for step in dis.get_instructions(method))
        stored = {step.argval for step in steps if step.opname == "STORE_ATTR"}  # of instances, most often
        known = {*dir(found), *stored}.union(*(inspect.get_annotations(own) for own in found.__mro__))
    return [part for part in NAMES[name] if part not in known]
