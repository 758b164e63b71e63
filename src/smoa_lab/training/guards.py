"""Guards of a run: that gradients reach what is trained, tried before the first step, and that they stay finite."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import TrainerCallback

from smoa.distributed import is_distributed
from smoa.errors import ConfigError, SmoaError
from smoa_lab.basics.names import first_of
from smoa_lab.data.encoding import IGNORED

logger = logging.getLogger(__name__)

MOST_BAD = 3
"""Steps in a row without finite gradients that end a run."""
REACHED_BY = 10
"""Steps after which tensors without a gradient are named."""
COUNTED = ("_metrics", "_total_train_tokens")
"""What TRL's trainers add up in a forward."""


class Diverged(ConfigError):  # noqa: N818 - says what the run did
    """A run's gradients are not finite any more. Its folder has neither adapter nor metrics; ``finish`` writes these,
    with losses that are not finite, and gives them."""

    finish: Callable[[], dict[str, Any]]


def guarded(trainer: Any) -> Any:
    """TRL's ``trainer`` class, whose batches pass a :class:`Guard`, its attribute ``guard``, before they are trained
    on."""

    class Guarded(trainer):  # type: ignore[misc]
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *others: Any) -> Tensor:
            step = partial(super().training_step, model)
            self.guard.look(self, inputs, lambda: step(dict(inputs), *others))
            loss: Tensor = step(inputs, *others)
            return loss

    Guarded.__name__ = trainer.__name__
    return Guarded


class Guard(TrainerCallback):
    """Looks at the batches and gradients of one run."""

    def __init__(self) -> None:
        self.was_tried = False
        self.trains = True
        """Whether every batch of this step has a token that is trained; ``without`` counts those that have none."""
        self.without = 0
        self.bad = self.skipped = self.steps = 0
        """Steps in a row without finite gradients, all of these, and all steps; ``was_finite``: one had them."""
        self.was_finite = False
        self.unreached: dict[str, nn.Parameter] | None = None

    def look(self, trainer: Any, inputs: dict[str, Any], step: Callable[[], object]) -> None:
        """Count a batch that trains nothing. The first one of a new run that trains something is tried by ``step``."""
        trains = _trains(inputs)
        self.trains &= trains
        self.without += not trains
        alike = trains or is_distributed()  # else the other processes would wait for this one
        if not self.was_tried and alike and trainer.state.global_step == 0:
            self.was_tried = True
            if (reason := _untried(trainer)) is not None:
                logger.info("Not tried whether gradients reach what is trained: %s", reason)
                return
            try:
                try_gradients(trainer, step, trains)
            except SmoaError:
                raise
            except (ValueError, TypeError, NotImplementedError) as error:  # not a lack of memory, which trainers handle
                raise ConfigError(f"training: the first step fails: {error}") from error

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Keep gradients that are not finite from the optimizer; of fp16 its scaler does."""
        parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        scaler, trains = getattr(optimizer, "scaler", None), self.trains
        self.steps, self.trains = self.steps + 1, True
        if _are_finite((each.grad for each in parameters.values() if each.grad is not None), args.device):
            self.bad, self.was_finite = 0, True
            self._name_unreached(parameters)
            return
        if scaler is None:
            for each in parameters.values():
                each.grad = None
        has_settled = scaler is None or self.was_finite or scaler.get_scale() <= 1
        is_bad = trains and has_settled
        self.bad += is_bad
        self.skipped += is_bad
        if self.bad >= MOST_BAD:
            found = (
                f"the gradients of {MOST_BAD} steps in a row, up to step {state.global_step + 1} of {state.max_steps}"
            )
            remedy = f"lower training.learning_rate ({args.learning_rate:g}), or take float32 as model.dtype"
            raise Diverged(f"training: {found}, are not finite: the run diverged, and no adapter is saved; {remedy}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.without:
            logger.warning("%d batches had no token that is trained", self.without)
        if self.skipped:
            told = "had gradients that are not finite, and changed nothing"
            logger.warning("%d of %d steps %s", self.skipped, self.steps, told)

    def _name_unreached(self, parameters: dict[str, nn.Parameter]) -> None:
        if self.unreached is None:
            self.unreached = parameters
        if self.unreached and self.steps <= REACHED_BY:
            self.unreached = {n: p for n, p in self.unreached.items() if p.grad is None or not p.grad.any()}
            if self.unreached and self.steps == REACHED_BY:
                named = f"{len(self.unreached)} trained tensors had no gradient in {REACHED_BY} steps"
                logger.warning("%s: %s; does the model use them for these rows?", named, first_of([*self.unreached]))


def _trains(inputs: dict[str, Any]) -> bool:
    """Whether a batch has a token at which the loss is taken: the first one of a row is never predicted."""
    labels = inputs.get("labels")
    return labels is None or bool((labels[:, 1:] != IGNORED).any())


def _are_finite(gradients: Iterable[Any], device: torch.device) -> bool:
    """Whether all are, on all processes, of which each has a part of those that are sharded."""
    parts = (each.to_local() if hasattr(each, "to_local") else each for each in gradients)
    values = [part for each in parts if (part := each._values() if each.is_sparse else each).numel()]
    largest = [each.float().to(device) for each in torch._foreach_norm(values, torch.inf)] if values else []
    bad = (~torch.stack([torch.zeros((), device=device), *largest]).isfinite()).any().float()
    if is_distributed():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad


def _untried(trainer: Any) -> str | None:
    """Why a trial can't be made; None if it can."""
    arguments = trainer.args
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or arguments.n_gpu > 1:
        return "the model is spread over devices"
    if arguments.torch_compile:
        return "the model is compiled"
    if "lomo" in arguments.optim or "layerwise" in arguments.optim:
        return "this optimizer steps within the backward"
    return None


def try_gradients(trainer: Any, step: Callable[[], object], trains: bool) -> None:
    """Take a batch forward and backward, throw its gradients away, and raise ConfigError where a gradient comes to a
    frozen layer and none leaves it, or no trained tensor gets one. Neither weights nor random numbers change; a batch
    that ``trains`` nothing shows nothing."""
    model: nn.Module = trainer.model
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in COUNTED if name in vars(trainer)}
    devices = [torch.cuda.current_device()] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _watched(model) as calls:
        step()
    vars(trainer).update(kept)
    trained = [each for each in model.parameters() if each.requires_grad]
    reached = any(each.grad is not None and bool(each.grad.any()) for each in trained)
    for each in trained:
        each.grad = None
    stuck = list(dict.fromkeys(name for name, came, left in calls if came and not left))
    stuck = [name for name in stuck if any(each.any() for each in model.get_submodule(name).parameters(recurse=False))]
    causes = "weights that were repacked for inference, code under torch.no_grad(), or a kernel without a backward"
    if trains and stuck:
        found = f"no gradient passes {first_of(stuck)}, so what lies before would train on a part of its gradient"
        raise ConfigError(f"training: {found}. Likely causes: {causes}; load the model in another way, or in float32")
    if trains and not reached:
        found = "no gradient reaches any trained tensor, so nothing would be learned"
        raise ConfigError(f"training: {found}. Likely causes: {causes}, or layers that the model doesn't call")


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[list[Any]]]:
    """Of each call of a frozen layer whose input requires a gradient: its name, whether one came to its output, and
    whether one left its input; either if it isn't zero all over."""
    calls: list[list[Any]] = []
    running: dict[str, list[Any]] = {}
    handles = []

    def watched(call: list[Any], place: int, tensor: Tensor) -> Tensor:
        def note(gradient: Tensor | None) -> None:
            call[place] |= gradient is not None and bool(gradient.any())

        tensor.register_hook(note)
        return tensor

    def before(name: str, _: nn.Module, args: Any, kwargs: Any) -> Any:
        call = [name, False, False]

        def entering(tensor: Tensor) -> Tensor:
            if not (tensor.is_floating_point() and tensor.requires_grad):
                return tensor
            running[name] = call
            # A tensor of its own: other layers share the input, and full backward hooks fail where Falcon adds in place
            return watched(call, 2, tensor.view_as(tensor))

        running.pop(name, None)
        return tree_map_only(Tensor, entering, (args, kwargs)) if torch.is_grad_enabled() else None

    def after(name: str, _: nn.Module, args: Any, output: Any) -> Any:
        if (call := running.pop(name, None)) is None:
            return None
        calls.append(call)

        def leaving(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            # An output that was computed without gradients gets one here, to see whether any is wanted.
            output = tensor if tensor.requires_grad else tensor.detach().requires_grad_().clone()
            return watched(call, 1, output)

        return tree_map_only(Tensor, leaving, output)

    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(each.requires_grad for each in own):
            handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
