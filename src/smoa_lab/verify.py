"""Checks that a merged model, a LoRA or a server answers as the adapter does: ``smoa verify``."""

from __future__ import annotations

import json
import logging
import math
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from peft.utils import CONFIG_NAME
from rich.filesize import decimal
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from smoa.errors import ConfigError, DataError, MergeError
from smoa_lab.base_models import load_weights
from smoa_lab.basics.folders import read_stored
from smoa_lab.config.run import ModelSection
from smoa_lab.merge import Merged, class_of, merge_in_memory, stored_share, with_plain_weights
from smoa_lab.open_run import (
    adapter_config,
    adapter_of_run,
    check_weights,
    model_of,
    resize_as_saved,
    run_name,
    with_saved_adapter,
)
from smoa_lab.scoring.evaluation import GREEDY
from smoa_lab.scoring.shares import logits_after, prompt_texts, share_and_noise

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""What rounding may change of a logit, relative to the largest one."""
SERVED = 1e-2
"""What may lie between the two best logits where a server, whose dtype is not known, takes the other one."""
TIMEOUT = 120
"""Seconds that a server may take for one prompt."""


Outcome = Literal["agrees", "differs", "can't tell"]
EXIT_CODES: dict[Outcome, int] = {"differs": 1, "can't tell": 3, "agrees": 0}
"""Of the command; of several outcomes the first counts."""
SHARE_TOLERANCE = 0.1
"""By how much the share of the adapter's change that a target has may be another than expected."""


@dataclass(frozen=True)
class Verdict:
    """``difference``: the largest between two logits of adapter and target, relative to the largest logit; for a
    server, the largest gap between the two best logits where it chose another token. ``allowed``: what rounding may
    change.

    ``share``: how much of what the adapter changes is there, ⟨target − base', adapter − base⟩ / ‖adapter − base‖² over
    all logits, base' rounded as the target is; of a server's answers those that are the adapter's. ``expected``: the
    share that a conversion or a merge measured, else 1. ``noise``: ‖what else the target changes‖ / ‖adapter − base‖.
    ``note``: what else there is to say.
    """

    target: str
    difference: float
    allowed: float
    note: str = ""
    share: float | None = None
    expected: float = 1.0
    noise: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """Differs beyond what rounding or, of a conversion, what it left out explains; can't tell where the noise is
        larger than the adapter's change, or as good as nothing of it was to be there."""
        if not self.difference <= self.allowed:
            return "differs"
        if self.noise > 1 or self.expected <= SHARE_TOLERANCE:
            return "can't tell"
        if self.share is None or abs(self.share - self.expected) <= SHARE_TOLERANCE:
            return "agrees"
        return "differs" if self.expected > 2 * SHARE_TOLERANCE else "can't tell"

    @property
    def agrees(self) -> bool:
        return self.outcome == "agrees"

    def line(self) -> str:
        sign = "DIFFERS" if self.outcome == "differs" else self.outcome
        expected = "" if self.expected == 1 else f", {self.expected:.1%} expected"
        shares = [] if self.share is None else [f"{self.share:.1%} of what the adapter changes is there{expected}"]
        more = "; ".join([*shares, *([self.note] if self.note else [])])
        said = f"largest difference {self.difference:.1e}, allowed {self.allowed:.0e}"
        return f"{sign}  {self.target}: {said}{'; ' * bool(more)}{more}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"agrees": self.agrees, "outcome": self.outcome}


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """The command's: 1 where one differs, or else 3 where one can't be told, or else 0."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return next(code for outcome, code in EXIT_CODES.items() if outcome in outcomes)


def verify(
    place: str | Path, targets: Sequence[str], served_name: str | None = None, tokens: int = 16, base: str | None = None
) -> list[Verdict]:
    """Compare an adapter, unmerged and in float32, with what it was made into, on ten prompts.

    Merged models and other adapters are loaded or made one at a time, each from a base that no adapter has touched;
    merged ones are compared with the adapter on the dequantized base.

    A target is ``merged``, which merges in memory; a folder with a merged model, or with another adapter of the base,
    such as a LoRA; or the address of a server (``http://…/v1``), which is asked by OpenAI's protocol for so many
    ``tokens`` of greedy continuations, of the adapter by its ``served_name`` or that of its folder or run.
    """
    source = adapter_of_run(place)
    check_weights(source)
    kinds = {target: _kind(target) for target in targets}
    wanted = model_of(source, base)

    def plain() -> PreTrainedModel:
        """The base with plain weights; quantized ones where nothing can be merged and they can't be dequantized."""
        loaded = wanted.load()
        try:
            loaded = with_plain_weights(loaded)
        except MergeError:
            if {"merged", "model"} & set(kinds.values()):
                raise
        resize_as_saved(loaded, source)  # the base too gives as many logits
        return loaded

    logger.info("Loading %s and its base", source)
    model, tokenizer = plain(), wanted.tokenizer
    prompts = prompt_texts()
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    logger.info("Comparing the logits after %d prompts", len(ids))
    before = logits_after(model, ids)
    asks = "server" in kinds.values()
    answers = [_greedy(model, each, tokens)[0] for each in ids] if asks else []
    adapted = with_saved_adapter(model, source).eval()
    own = logits_after(adapted, ids)
    computed = "float32" if getattr(model, "hf_quantizer", None) is None else "bfloat16"  # as its kernels do
    largest = float(own.abs().max())
    changed = float((own - before).abs().max()) / largest
    verdicts = [Verdict("base", 0.0, 0.0, f"the adapter changes logits by up to {changed:.1e}")]
    if not changed:
        verdicts = [Verdict("base", 1.0, 0.0, "the adapter changes nothing: untrained, or not applied")]
    name = served_name or run_name(source)

    rounded = {"float32": before}
    """The logits of the base, by the dtype that its weights were rounded to."""

    def compared(target: str, other: Tensor, dtype: str) -> Verdict:
        difference, allowed = float((other - own).abs().max()) / largest, max(TOLERANCE[computed], TOLERANCE[dtype])
        if not changed:
            return Verdict(target, difference, allowed, "the adapter changes nothing")
        if dtype not in rounded:
            model = plain()
            for weight in model.parameters():
                weight.data = weight.data.to(getattr(torch, dtype)).float()
            rounded[dtype] = logits_after(model, ids)
        expected = None if kinds[target] == "merged" else stored_share(Path(target))
        share, noise = share_and_noise(own - before, other - rounded[dtype])
        note = ""
        if kinds[target] == "adapter" and expected is not None:  # it differs by what a conversion left out
            allowed = max(allowed, changed * (1 + SHARE_TOLERANCE))
            note = "a converted LoRA may differ by all that the adapter changes, and a tenth"
        return Verdict(target, difference, allowed, note, share, 1.0 if expected is None else expected, noise)

    found: dict[str, Verdict] = {}
    for target in (target for target, kind in kinds.items() if kind == "server"):
        found[target] = _served(adapted, tokenizer, target, name, prompts, ids, answers, tokens)
    del model, adapted
    for target in (target for target in targets if target not in found):
        if kinds[target] == "adapter":
            other, dtype = with_saved_adapter(plain(), Path(target)), "float32"
        elif kinds[target] == "merged":
            other, dtype = merge_in_memory(plain(), source, Merged(Path(target), wanted.section.name)), "float32"
        else:
            other, dtype = load_weights(ModelSection(name=target, dtype="float32"))[0], _dtype_of(target)
        found[target] = compared(target, logits_after(other, ids), dtype)
        del other
    return verdicts + [found[target] for target in targets]


def verify_merged(place: str | Path, folder: Path, base: str | None = None) -> Verdict | str:
    """What :func:`verify` says of a merged model that was just saved; or, as a text, why it can't be compared: it is no
    language model, has no tokenizer, or in float32 doesn't fit into the memory that is free."""
    if not class_of(adapter_config(adapter_of_run(place)))[1].endswith("ForCausalLM"):
        return "only language models can be"
    if not any(folder.glob("tokenizer*")):
        return "it has no tokenizer"
    saved = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = saved * 4 // getattr(torch, _dtype_of(str(folder))).itemsize
    if needed > (free := psutil.virtual_memory().available):
        return f"in float32 it takes {decimal(needed)} of memory, of which {decimal(free)} are free"
    return verify(place, [str(folder)], base=base)[-1]


def _kind(target: str) -> str:
    if target == "merged":
        return "merged"
    if target.startswith(("http://", "https://")):
        return "server"
    for name, kind in ((CONFIG_NAME, "adapter"), (MODEL_CONFIG_NAME, "model")):
        if Path(target, name).is_file():
            return kind
    raise ConfigError(
        f"--against {target}: is neither merged, nor a model's or an adapter's folder, nor a server's address (http://…)"
    )


def _dtype_of(folder: str) -> str:
    """In which dtype a model's weights are saved, by its config; bfloat16 for one that has no tolerance."""
    config = read_stored(Path(folder, MODEL_CONFIG_NAME))
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return found if found in TOLERANCE else "bfloat16"


@torch.no_grad()
def _greedy(model: Any, ids: Tensor, tokens: int) -> tuple[list[int], list[float]]:
    """The tokens of the greedy continuation, and the gap between the two best logits at each, to the largest one."""
    output = model.generate(
        input_ids=ids.to(model.device),
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=model.generation_config.pad_token_id or 0,
        **GREEDY,
    )
    best = [logits.float().topk(2).values[0] for logits in output.logits]
    largest = max(float(logits.float().abs().max()) for logits in output.logits)
    return output.sequences[0, ids.shape[1] :].tolist(), [float(two[0] - two[1]) / largest for two in best]


def _served(
    model: Any,
    tokenizer: Any,
    address: str,
    name: str,
    prompts: Sequence[str],
    ids: Sequence[Tensor],
    of_base: Sequence[list[int]],
    tokens: int,
) -> Verdict:
    """A server's greedy continuations beside the adapter's own and the base's. It can't be told where in none of them
    the adapter chooses another token than the base by more than a server may round."""
    worst, same, as_base, telling = 0.0, 0, 0, 0
    for prompt, each, base in zip(prompts, ids, of_base, strict=True):
        text = _asked(address, name, prompt, tokens)
        own, gaps = _greedy(model, each, tokens)
        parts = next((place for place, pair in enumerate(zip(own, base, strict=False)) if len({*pair}) > 1), None)
        telling += parts is not None and gaps[parts] > SERVED
        matching = _matching(tokenizer, own, text)
        same += matching == len(own)
        as_base += matching < len(own) and _matching(tokenizer, base, text) == len(base)
        worst = max(worst, 0.0 if matching == len(own) else gaps[matching])
    note = f"{same} of {len(prompts)} answers are the same"
    if as_base > 1 and same + as_base == len(prompts):
        worst, note = 1.0, f"{note}, the others are the base model's: the server seems to ignore the adapter"
    elif not telling:
        note = f"{note}, and in none of them the adapter changes more than a server may round"
    return Verdict(f"{address} ({name})", worst, SERVED, note, same / len(prompts), noise=0.0 if telling else math.inf)


def _matching(tokenizer: Any, tokens: Sequence[int], text: str) -> int:
    """With how many of the tokens a text begins; all of them if they end it."""
    for count in range(len(tokens)):
        begun = tokenizer.decode(tokens[: count + 1], skip_special_tokens=True).rstrip("\ufffd")
        if not text.startswith(begun):
            return count
    return len(tokens)


def _asked(address: str, name: str, prompt: str, tokens: int) -> str:
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    request = urllib.request.Request(f"{address.rstrip('/')}/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return str(json.load(answer)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        raise DataError(f"{address}: refuses {name!r}: {error.read(500).decode(errors='replace')}") from error
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{address}: gives no completion ({error}); is it a server of OpenAI's protocol?") from error
