"""The machine: each rule is a line of user code, run in `space`, and what it did is held against the oracle.

A failing example prints its lines as a script. `MASKED` names faults that are known (`../shared/faults`): what leads to
one is then not drawn, so that it doesn't hide the next.
"""

import copy
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

import smoa
from smoa import SmoaConfig, SmoaError
from smoa.hotswap import hotswap_adapter
from smoa.layers.calls import OPEN
from tests.states.bases import WORDS, base, parted
from tests.states.oracle import PARTS, Facts, Oracle, of_file, plain, read

MASKED: set[str] = set()
"""Known faults that are not looked for."""
COUNTS: Counter[str] = Counter()
PAIRS: Counter[tuple[str, str]] = Counter()
"""How often each rule ran, and in how many examples each pair of rules did."""
FIRST: list[float] = []
"""When the first example failed."""
GOLDEN = Path(__file__).parents[1] / "golden" / "adapters" / "tied"
NAMES = ("a", "b", "ab", "c", "d", "e", "0", "1", "mlp", "weight", "smoa_c", "down")
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 8e-2}
SCRIPT = """import copy, smoa, torch
from contextlib import suppress
from peft import PeftModel, get_peft_model
from smoa import SmoaConfig
from smoa.hotswap import hotswap_adapter
from tests.states.bases import base
d = "/tmp/states"  # a folder"""
TARGETS = {
    "mini": ("embed_tokens", "conv", "proj", "mix", "down", "lm_head"),
    "llama": ("q_proj", "down_proj", "embed_tokens", "lm_head"),
    "mixture": ("q_proj", "embed_tokens"),
}
PARAMETERS = {
    "mini": ("lm_head.weight", "mix.weight"),
    "llama": ("lm_head.weight",),
    "mixture": ("experts.gate_up_proj", "experts.down_proj"),
}
NO_REFUSAL, MAY_REFUSE, MUST_REFUSE = "no refusal", "may refuse", "must refuse"


def masked(fault: str) -> bool:
    return fault in MASKED


def rarely(draw: Any, times: int) -> bool:
    """Once in so many times; a shorter example has none."""
    return bool(draw(st.integers(1, times)) == times)


@st.composite
def settings_of(draw: Any, kind: str, tied: bool, in_words: bool) -> dict[str, Any]:
    """Settings of an adapter that a base takes; `in_words` allows what goes beyond layers (copies, biases)."""
    targets = draw(st.sets(st.sampled_from(TARGETS[kind]), min_size=0, max_size=3))
    parameters = draw(st.sets(st.sampled_from(PARAMETERS[kind]), max_size=2))
    parameters = {each for each in parameters if each.removesuffix(".weight") not in targets}
    if tied and masked("L4"):
        parameters -= {"lm_head.weight"}
    if masked("L8") or (masked("L9") and tied):
        targets -= {"embed_tokens"}
    if tied and {"embed_tokens", "lm_head"} <= targets | {each.removesuffix(".weight") for each in parameters}:
        targets -= {"lm_head"}
        parameters -= {"lm_head.weight"}
    if not targets and not parameters:
        targets = {"down" if kind == "mini" else "q_proj"}
    found: dict[str, Any] = {"r": draw(st.sampled_from([4, 2, 6])), "num_blocks": draw(st.sampled_from([2, 1, 3]))}
    found["r"] = found["r"] * found["num_blocks"]
    if draw(st.booleans()):
        found["alpha"] = draw(st.sampled_from([3.0, 20.0]))
    found["init_weights"] = False
    found["target_modules"] = sorted(targets)
    if parameters:
        found["target_parameters"] = sorted(parameters)
    for name, values in {
        "modulation": ["hadamard", "none"],
        "partition": ["contiguous", "spectral", "random"],
        "scale": ["lora", "paper", "block", "layer"],
    }.items():
        if rarely(draw, 4):
            found[name] = draw(st.sampled_from(values))
    if not (masked("L3") and targets & {"embed_tokens", "conv"}) and rarely(draw, 4):
        found["smoa_dropout"] = 0.5
    if in_words and kind == "mini":
        found["bias"] = "smoa_only"
    if (
        in_words
        and kind == "llama"
        and not tied
        and "lm_head" not in {each.split(".")[0] for each in targets | parameters}
    ):
        found["modules_to_save"] = ["lm_head"]
    return found


class Machine(RuleBasedStateMachine):
    """A model `m`, and an oracle that knows what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.space: dict[str, Any] = {
            "copy": copy, "smoa": smoa, "torch": torch, "SmoaConfig": SmoaConfig, "base": base, "d": self.folder,
            "PeftModel": peft.PeftModel, "get_peft_model": peft.get_peft_model,
            "hotswap_adapter": hotswap_adapter,
        }  # fmt: skip
        self.lines: list[str] = []
        self.ran: list[str] = []
        self.saved: list[tuple[str, Facts, dict[str, Tensor]]] = []
        torch.manual_seed(0)
        torch.compiler.set_stance("force_eager")
        smoa.clear_spectrum_cache()
        note(SCRIPT)

    # What is run, and how it is judged.

    @property
    def m(self) -> Any:
        return self.space["m"]

    def run(self, line: str) -> None:
        note(line)
        self.lines.append(line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(line, self.space)  # lines of this file

    def bits(self) -> Any:
        state = {key: tensor.clone() for key, tensor in self.m.state_dict().items()}
        return state, list(self.m.peft_config), list(self.m.active_adapters), self.m.training

    def attempt(self, line: str, refusal: str = NO_REFUSAL) -> bool:
        """Run a line that may be refused by a clear error, after which every bit is as it was."""
        before = self.bits() if refusal != NO_REFUSAL else None
        try:
            self.run(line)
        except (SmoaError, ValueError, TypeError) as error:
            if before is None:
                raise
            note(f"# refused: {str(error)[:150]}")
            after = self.bits()
            assert before[1:] == after[1:], f"a refusal changed {before[1:]} to {after[1:]}"
            assert before[0].keys() == after[0].keys(), "a refusal left or took tensors"
            for key, tensor in before[0].items():
                assert same(tensor, after[0][key]), f"a refusal changed {key}"
            return False
        assert refusal != MUST_REFUSE, "not refused"
        return True

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        COUNTS[name] += 1
        self.ran.append(name)
        yield

    def can(self, name: str) -> bool:
        return name in self.swarm

    @property
    def trains(self) -> bool:
        """Tied adapters are for inference, and a step would train PEFT's LoRA too."""
        return self.kind != "golden" and not self.traits.get("lora")

    # The state.

    @initialize(data=st.data(), swarm=st.sets(st.sampled_from(sorted(
        ["add", "load", "load_over", "set_adapter", "disable", "train", "mode", "write_between", "by_names", "generate",
         "weighted", "merge", "unmerge", "merged", "delete", "hotswap", "save", "reload", "deepcopy", "assign",
         "compile", "not_a_number", "broken_file"])), min_size=5, max_size=8))  # fmt: skip
    def begin(self, data: Any, swarm: set[str]) -> None:
        self.swarm = swarm
        draw = data.draw
        self.kind = draw(st.sampled_from(["mini", "llama", "mini", "llama", "mixture", "golden"]))
        self.dtype = draw(st.sampled_from(["float64", "float64", "float64", "float32", "bfloat16"]))
        self.traits: dict[str, Any] = {}
        self.is_pinned = False
        if self.kind == "golden":
            self.dtype = "float32"
        elif rarely(draw, 4):
            self.traits["tied"] = True
        if self.kind == "mini" and not masked("L6") and rarely(draw, 10):
            self.traits["twice"] = True
        if self.kind == "llama" and rarely(draw, 6):
            self.traits["resized"] = 1
        if self.kind in ("mini", "llama") and not masked("L5") and rarely(draw, 10):
            self.traits["lora"] = "down" if self.kind == "mini" else "down_proj"
        if self.kind == "mixture":
            self.dtype = draw(st.sampled_from(["float64", "float32"]))
        self.begin_model()
        self.is_training, self.merged_now, self.active = False, [], []
        words = WORDS + 2 if self.traits.get("resized") else WORDS
        self.ids = torch.randint(1, words, (3, 5), generator=torch.Generator().manual_seed(1))
        self.space["ids"] = self.ids
        if self.kind == "golden":
            path = self.space["golden"] = str(GOLDEN)
            low = draw(st.booleans())
            self.run(f"m = PeftModel.from_pretrained(b, {path!r}, adapter_name='a', low_cpu_mem_usage={low})")
            config = json.loads((GOLDEN / "adapter_config.json").read_text())
            self.oracle.adapters["a"] = of_file(path, config)[0]
        else:
            name = draw(st.sampled_from(self.names()))
            config = draw(settings_of(self.kind, bool(self.traits.get("tied")), rarely(draw, 4)))
            try:
                self.run(f"m = get_peft_model(b, {shown(config)}, adapter_name={name!r})")
            except (SmoaError, ValueError) as error:
                if self.may_refuse(config) == NO_REFUSAL:
                    raise AssertionError("refused") from error
                note("# refused: start again with what is taken")
                self.traits = {}
                self.ids = self.space["ids"] = self.ids.clamp(max=WORDS - 1)
                self.begin_model()
                config = {"r": 4, "init_weights": False, "target_modules": ["down", "q_proj"]}
                self.run(f"m = get_peft_model(b, {shown(config)}, adapter_name={name!r})")
            self.oracle.adapters[name] = read(self.m, name, config)
        self.active = list(self.oracle.adapters)
        self.check()

    def begin_model(self) -> None:
        given = ", ".join(f"{name}={value!r}" for name, value in {"dtype": self.dtype, **self.traits}.items())
        self.run(f"b = base({self.kind!r}, {given})")
        model = self.space["b"]
        self.same_dtype = copy.deepcopy(model)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        state = {name: dict(model.named_parameters(remove_duplicate=False))[name].detach().clone() for name in names}
        self.oracle = Oracle(parted(model), state)
        self.own_dtype = parted(model).to(getattr(torch, self.dtype))

    def names(self) -> list[str]:
        known = getattr(self, "oracle", None)
        names = [name for name in NAMES if known is None or name not in known.adapters]
        names = [name for name in names if not (masked("L13") and name in ("0", "1", "mlp", "weight", "down"))]
        return [name for name in names if not (masked("L15") and name.startswith("smoa_"))]

    def may_refuse(self, config: dict[str, Any]) -> str:
        targets = {*(config.get("target_modules") or []), *(config.get("target_parameters") or [])}
        own = {each.removesuffix(".weight") for each in targets}
        if self.traits.get("twice") and own & {"mix", "again"}:
            return MAY_REFUSE
        if self.traits.get("lora") in own:
            return MAY_REFUSE
        if self.traits.get("tied") and "lm_head.weight" in targets:
            return MAY_REFUSE
        return NO_REFUSAL

    @property
    def facts(self) -> list[Facts]:
        return [self.oracle.adapters[name] for name in self.active if name in self.oracle.adapters]

    def copied(self, names: list[str]) -> Facts | None:
        found = [self.oracle.adapters[name] for name in names if self.oracle.adapters[name].copies]
        return found[0] if found else None

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def close(self, found: Tensor, expected: Tensor, what: str, coarse: float = 0.0) -> None:
        found, expected = found.detach().double(), expected.detach()
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
        assert error <= max(self.tolerance, coarse), f"{what}: off by {error:.2e} of the largest"

    # After each rule.

    def check(self) -> None:
        m = self.m
        with torch.no_grad():
            was = [module for module in m.modules() if module.training]
            is_random = m.training and any(f.has_dropout for f in self.facts)
            merged = [frozen for _, frozen in self.merged_now]
            if not is_random:
                expected = self.oracle.output(self.ids, self.facts, self.copied(self.active), merged)
                self.close(logits(m(self.ids)), expected, "output")
            if not self.merged_now:
                for key, tensor in m.state_dict().items():
                    name = plain(key)
                    if name in self.oracle.state and ".modules_to_save." not in key and not self.is_lora(name):
                        assert same(tensor, self.oracle.state[name]), f"the base's {name} is not as it was"
                if "disable" in self.swarm and not self.traits.get("lora"):
                    with m.disable_adapter():
                        found = logits(m(self.ids))
                    assert same(found, self.plain_output(self.ids)), "the disabled model is not the base"
            assert [module for module in m.modules() if module.training] == was

    def is_lora(self, name: str) -> bool:
        return bool(self.traits.get("lora")) and self.traits["lora"] in name

    def plain_output(self, ids: Tensor) -> Tensor:
        return logits(functional_call(self.own_dtype, self.oracle.state, (ids,), strict=False))

    # Rules.

    @precondition(lambda self: self.can("add") and len(self.oracle.adapters) < 4 and self.kind != "golden")
    @rule(data=st.data())
    def add(self, data: Any) -> None:
        with self.counted("add"):
            name = data.draw(st.sampled_from(self.names()))
            config = data.draw(settings_of(self.kind, bool(self.traits.get("tied")), False))
            if data.draw(st.booleans()):  # like one that is there but for a setting
                like = next(iter(self.oracle.adapters.values())).config
                plain_like = {k: v for k, v in like.items() if k not in ("bias", "modules_to_save")}
                more = data.draw(st.sampled_from([{"alpha": 20.0}, {"modulation": "none"}, {"scale": "paper"}, {}]))
                config = {**plain_like, "init_weights": False, **more}
            both = {each.split(".")[0] for f in [config, *(f.config for f in self.oracle.adapters.values())]
                    for each in (*(f.get("target_modules") or []), *(f.get("target_parameters") or []))}  # fmt: skip
            if {"lm_head", "embed_tokens"} <= both and self.traits.get("tied"):
                return  # an adapter each: merging is refused, tests have it
            if "lm_head" in both and any(f.copies for f in self.oracle.adapters.values()):
                return  # a copy can't be adapted
            if not both_ways(config, [f.config for f in self.oracle.adapters.values()]):
                return  # PEFT refuses a module and its parameter
            if self.attempt(f"m.add_adapter({name!r}, {shown(config)})", self.may_refuse(config)):
                self.oracle.adapters[name] = read(self.m, name, config)
                self.merged_now = []  # as PEFT: an adapter that is added unmerges
            self.check()

    @precondition(
        lambda self: self.swarm.isdisjoint({"disable", "set_adapter", "mode", "deepcopy", "unmerge", "train"})
    )
    @rule()
    def call(self) -> None:
        with self.counted("call"):
            self.run("with torch.no_grad(): y = m(ids)")
            self.check()

    @precondition(lambda self: self.can("set_adapter"))
    @rule(data=st.data())
    def set_adapter(self, data: Any) -> None:
        with self.counted("set_adapter"):
            names = data.draw(
                st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=1, max_size=2, unique=True)
            )
            if any(self.oracle.adapters[name].copies for name in names):
                names = names[:1]
            self.run(f"m.set_adapter({names[0]!r})" if len(names) == 1 else f"m.base_model.set_adapter({names!r})")
            self.active, self.merged_now = names, []
            self.check()

    @precondition(lambda self: self.can("disable"))
    @rule()
    def disable(self) -> None:
        with self.counted("disable"):
            self.run("with m.disable_adapter(): y = m(ids)")
            self.merged_now = []  # as PEFT: disabling unmerges
            if not self.traits.get("lora"):
                assert same(logits(self.space["y"]), self.plain_output(self.ids)), "the disabled model is not the base"
            self.check()

    @precondition(lambda self: self.can("mode"))
    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        with self.counted("mode"):
            self.run("m.train()" if train else "m.eval()")
            self.is_training = train
            self.check()

    @precondition(lambda self: self.can("train") and not self.merged_now and self.trains)
    @rule(write=st.booleans())
    def train(self, write: bool) -> None:
        with self.counted("train"):
            self.step("m(ids)", [self.active] * len(self.ids), write=write and self.can("write_between"))

    @precondition(
        lambda self: (
            self.can("by_names")
            and not self.merged_now
            and self.kind not in ("mixture", "golden")
            and not self.traits.get("lora")
        )
    )
    @rule(data=st.data())
    def by_names(self, data: Any) -> None:
        with self.counted("by_names"):
            known = [name for name, facts in self.oracle.adapters.items() if not facts.copies]
            names = data.draw(st.lists(st.sampled_from(["__base__", *known]), min_size=3, max_size=3))
            if any(self.oracle.adapters[name].copies for name in self.active):
                return
            if any(name.endswith(".weight") for f in self.oracle.adapters.values() for name in f.layers):
                return  # parameters take no names
            of_rows = [[] if name == "__base__" else [name] for name in names]
            call = f"m(ids, adapter_names={names!r})"
            if data.draw(st.booleans()) and self.can("train") and any(of_rows):
                self.run(f"m.base_model.set_requires_grad({sorted({*names} - {'__base__'})!r})")
                write = self.can("write_between") and not masked("L7") and data.draw(st.booleans())
                self.step(call, of_rows, write=write)
                return
            self.run(f"with torch.no_grad(): y = {call}")
            if not (self.m.training and any(self.oracle.adapters[n].has_dropout for row in of_rows for n in row)):
                for i, row in enumerate(of_rows):
                    expected = self.oracle.output(self.ids[i : i + 1], [self.oracle.adapters[n] for n in row])
                    self.close(logits(self.space["y"])[i : i + 1], expected, f"row {i} of the batch by names")
            self.check()

    def step(self, call: str, of_rows: list[list[str]], write: bool) -> None:
        """A step of training, perhaps with factors written between forward and backward."""
        used = sorted({name for row in of_rows for name in row})
        facts = {name: self.oracle.adapters[name] for name in used}
        if any(f.copies or f.config.get("bias", "none") != "none" for f in facts.values()):
            return
        random = self.m.training and any(f.has_dropout for f in facts.values())
        if write and masked("L7") and any("conv" in f.layers for f in facts.values()):
            write = False
        self.run(f"m.zero_grad(); y = {call}; y = getattr(y, 'logits', y)")
        y = self.space["y"]
        if not y.requires_grad:
            return
        cotangent = self.space["g"] = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        self.lines.append("g = torch.randn(y.shape).to(y.dtype)")
        if write:
            self.run("with torch.no_grad(): [p.add_(0.1) for p in m.parameters() if p.requires_grad]")
        try:
            self.run("(y * g).sum().backward()")
        except RuntimeError as error:
            if not write or "modified by an inplace operation" not in str(error):
                raise
        else:
            if not random:
                per_row = [[facts[name] for name in row] for row in of_rows]
                expected = self.oracle.gradients(self.ids, per_row, cotangent.double())
                parameters = dict(self.m.named_parameters())
                numbers = {id(f): name for name, f in facts.items()}
                for (number, layer, part), gradient in expected.items():
                    found = self.parameter(parameters, layer, part, numbers[number])
                    if found is not None and found.requires_grad:
                        assert found.grad is not None or not gradient.any(), f"{layer}.{part} has no gradient"
                        if found.grad is not None:
                            self.close(found.grad, gradient, f"gradient of {layer}.{part}")
        self.run(
            "with torch.no_grad(): [p.sub_(0.02 * p.grad.clamp(-1, 1)) for p in m.parameters() if p.grad is not None]"
        )
        for name in self.oracle.adapters:
            self.oracle.adapters[name] = read(self.m, name, self.oracle.adapters[name].config)
        self.check()

    def parameter(self, parameters: dict[str, Any], layer: str, part: str, name: str) -> Any:
        head, _, tail = part.partition(".")
        own = layer.rpartition(".")[0] if self.oracle.parameter(layer) == layer else layer
        ends = f".{head}.{name}.{tail}"
        found = [tensor for key, tensor in parameters.items() if key.endswith(ends) and plain(key) == own + ends]
        return found[0] if len(found) == 1 else None  # of two parameters of one module it can't be told here

    @precondition(lambda self: self.can("generate") and self.kind in ("llama", "mixture") and not self.merged_now)
    @rule(data=st.data())
    def generate(self, data: Any) -> None:
        with self.counted("generate"):
            if self.m.training:
                return
            if (
                self.kind == "mixture"
                and masked("E9")
                and any(f.config["num_blocks"] == 1 for f in self.oracle.adapters.values())
            ):
                return
            times, names, more = data.draw(st.integers(1, 2)), None, ""
            known = [name for name, facts in self.oracle.adapters.items() if not facts.copies]
            plain_layers = not any(n.endswith((".weight", "_proj")) and n in self.oracle.state
                                   for f in self.oracle.adapters.values() for n in f.layers)  # fmt: skip
            if known and plain_layers and not self.copied(self.active) and data.draw(st.booleans()):
                names = data.draw(st.lists(st.sampled_from(["__base__", *known]), min_size=3, max_size=3))
                more = f", adapter_names={names!r}"
            sampled = "do_sample=True, top_k=0, return_dict_in_generate=True, output_logits=True"
            self.run(f"o = m.generate(input_ids=ids, max_new_tokens=3, num_return_sequences={times}, {sampled}{more})")
            out = self.space["o"]
            for i, sequence in enumerate(out.sequences):
                row = i // times
                own = self.active if names is None else [names[row]] if names[row] != "__base__" else []
                facts = [self.oracle.adapters[name] for name in own]
                expected = self.oracle.output(sequence[None, :-1], facts, self.copied(own))
                for step, found in enumerate(out.logits):
                    self.close(found[i], expected[0, self.ids.shape[1] - 1 + step], f"token {step} of row {i}", 1e-5)
            self.check()

    @precondition(
        lambda self: (
            self.can("weighted") and len(self.oracle.adapters) > 1 and not self.merged_now and self.kind != "golden"
        )
    )
    @rule(data=st.data())
    def weighted(self, data: Any) -> None:
        with self.counted("weighted"):
            names = data.draw(st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=2, max_size=2))
            new = data.draw(st.sampled_from(self.names()))
            parts = [self.oracle.adapters[name] for name in names]
            if len(self.oracle.adapters) > 4:
                return
            line = f"m.add_weighted_adapter({names!r}, [0.7, -1.2], {new!r}, combination_type='cat')"
            if self.attempt(line, MAY_REFUSE):
                r = sum(part.config["r"] for part in parts)
                config = {**parts[0].config, "r": r, "alpha": None, "scale": "paper"}
                self.oracle.adapters[new], self.merged_now = read(self.m, new, config), []
                for layer in parts[0].layers:
                    sums = 0.7 * self.oracle.delta(parts[0], layer) - 1.2 * self.oracle.delta(parts[1], layer)
                    self.close(self.oracle.delta(self.oracle.adapters[new], layer), sums, f"sum in {layer}")
            self.check()

    @precondition(lambda self: self.can("merge"))
    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: Any, safe: bool) -> None:
        with self.counted("merge"):
            names = data.draw(
                st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=1, max_size=2, unique=True)
            )
            if any(self.oracle.adapters[name].copies for name in self.active):
                names = self.active
            if self.attempt(f"m.merge_adapter(adapter_names={names!r}, safe_merge={safe})", self.merge_refusal()):
                known = [name for name, _ in self.merged_now]
                self.merged_now += [(name, self.oracle.adapters[name]) for name in names if name not in known]
            self.check()

    def merge_refusal(self) -> str:
        every = [self.may_refuse(f.config) for f in self.oracle.adapters.values()]
        return MAY_REFUSE if MAY_REFUSE in every or self.traits.get("lora") or self.traits.get("twice") else NO_REFUSAL

    @precondition(lambda self: self.can("unmerge") or (self.can("merge") and self.merged_now))
    @rule()
    def unmerge(self) -> None:
        with self.counted("unmerge"):
            self.run("m.unmerge_adapter()")
            self.merged_now = []
            self.check()

    @precondition(lambda self: self.can("merged") and not self.merged_now)
    @rule()
    def merged(self) -> None:
        with self.counted("merged"):
            if self.attempt("with smoa.merged(m), torch.no_grad(): y = m(ids)", self.merge_refusal()):
                expected = self.oracle.output(self.ids, self.facts, self.copied(self.active))
                self.close(logits(self.space["y"]), expected, "output within smoa.merged")
            self.check()

    @precondition(lambda self: self.can("delete") and len(self.oracle.adapters) > 1)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        with self.counted("delete"):
            name = data.draw(st.sampled_from(sorted(self.oracle.adapters)))
            if name in [known for known, _ in self.merged_now]:
                self.attempt(f"m.delete_adapter({name!r})", MAY_REFUSE)
                return
            must_choose = name in self.active or name == self.m.active_adapter
            self.run(f"m.delete_adapter({name!r})")
            del self.oracle.adapters[name]
            if must_choose:
                self.active, self.merged_now = [sorted(self.oracle.adapters)[0]], []
                self.run(f"m.set_adapter({self.active[0]!r})")
            self.check()

    # Files.

    @precondition(lambda self: self.can("save") or self.can("reload") or self.can("load") or self.can("hotswap"))
    @rule(data=st.data())
    def save(self, data: Any) -> None:
        with self.counted("save"):
            folder = f"{len(self.saved)}_{len(self.lines)}"
            tables = data.draw(st.sampled_from(["'auto'", "'auto'", "False"]))
            if masked("L17") or self.traits.get("resized"):
                tables = "'auto'"
            self.run(f"m.save_pretrained(d + '/{folder}', save_embedding_layers={tables})")
            for name, facts in self.oracle.adapters.items():
                path = f"{self.folder}/{folder}" + ("" if name == "default" else f"/{name}")
                found, rest = of_file(path, facts.config, facts.copies)
                assert found.layers.keys() == facts.layers.keys(), f"saved {[*found.layers]}, not {[*facts.layers]}"
                for layer, own in facts.layers.items():
                    for part, tensor in own.items():
                        assert same(found.layers[layer][part], tensor), f"{layer}.{part} is not what was saved"
                for key, tensor in facts.copies.items():
                    assert same(found.copies[key], tensor), f"the copy of {key} is not what was saved"
                for key, tensor in rest.items():
                    if key in self.oracle.state:
                        assert same(tensor, self.oracle.state[key]), f"the saved {key} is not the base's"
                self.saved.append((path, found, rest))
            self.check()

    def path(self, data: Any) -> tuple[str, Facts, dict[str, Tensor]]:
        return self.saved[data.draw(st.integers(0, len(self.saved) - 1))]

    def shown_path(self, path: str) -> str:
        return f"d + {path.removeprefix(self.folder)!r}"

    @precondition(lambda self: self.can("load") and self.saved and len(self.oracle.adapters) < 4)
    @rule(data=st.data(), low=st.booleans(), trains=st.booleans())
    def load(self, data: Any, low: bool, trains: bool) -> None:
        with self.counted("load"):
            path, facts, rest = self.path(data)
            name = data.draw(st.sampled_from(self.names()))
            given = f"low_cpu_mem_usage={low}, is_trainable={trains}"
            has_bias = facts.config.get("bias", "none") != "none"
            tied = bool(facts.config.get("ensure_weight_tying"))
            if has_bias and any(f.config.get("bias", "none") != "none" for f in self.oracle.adapters.values()):
                return  # PEFT refuses a second
            if facts.copies and self.merged_now:
                return
            refusal = MUST_REFUSE if tied and trains and not masked("tied") else NO_REFUSAL
            if refusal == MUST_REFUSE and self.merged_now:
                return  # PEFT unmerges before it asks
            if self.attempt(f"m.load_adapter({self.shown_path(path)}, {name!r}, {given})", refusal):
                self.oracle.adapters[name] = self.in_dtype(facts)
                for key, tensor in rest.items():
                    if key.endswith(".bias"):
                        self.oracle.state[key] = tensor.to(self.oracle.state[key].dtype)
                self.is_training, self.merged_now = self.is_training and trains, []
            self.check()

    def in_dtype(self, facts: Facts) -> Facts:
        """As it is loaded: PEFT has factors of 16 bits in float32, and others in the base's dtype."""
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        layers = {
            layer: {part: tensor.to(dtype) if part in PARTS[:2] else tensor for part, tensor in own.items()}
            for layer, own in facts.layers.items()
        }
        return Facts(facts.config, layers, {n: t.to(self.oracle.state[n].dtype) for n, t in facts.copies.items()})

    @precondition(lambda self: self.can("load_over") and self.saved)
    @rule(data=st.data(), low=st.booleans())
    def load_over(self, data: Any, low: bool) -> None:
        with self.counted("load_over"):
            path, facts, rest = self.path(data)
            name = data.draw(st.sampled_from(sorted(self.oracle.adapters)))
            old = self.oracle.adapters[name]
            alike = old.config == facts.config
            if name in [known for known, _ in self.merged_now] or (not alike and masked("L2")):
                return
            if any(key.endswith(".bias") for key in rest) or facts.copies or old.copies:
                return
            line = f"m.load_adapter({self.shown_path(path)}, {name!r}, low_cpu_mem_usage={low})"
            if self.attempt(line, NO_REFUSAL if alike else MAY_REFUSE):
                self.oracle.adapters[name] = self.in_dtype(facts)
            self.check()

    @precondition(lambda self: self.can("hotswap") and self.saved)
    @rule(data=st.data())
    def hotswap(self, data: Any) -> None:
        with self.counted("hotswap"):
            path, facts, _ = self.path(data)
            name = data.draw(st.sampled_from(sorted(self.oracle.adapters)))
            old = self.oracle.adapters[name]
            if facts.copies or old.copies or facts.config.get("bias", "none") != "none":
                return
            is_merged = name in [known for known, _ in self.merged_now]
            refusal = MUST_REFUSE if is_merged else NO_REFUSAL if old.config == facts.config else MAY_REFUSE
            if self.attempt(f"hotswap_adapter(m, {self.shown_path(path)}, {name!r})", refusal):
                self.oracle.adapters[name] = new = read(self.m, name, old.config)
                for layer in old.layers:
                    found = self.oracle.delta(new, layer)
                    has = layer in facts.layers
                    expected = self.oracle.delta(facts, layer) if has else torch.zeros_like(found)
                    self.close(found, expected, f"ΔW of {layer} after hotswap")
            self.check()

    @precondition(lambda self: self.can("reload") and self.saved)
    @rule(data=st.data(), low=st.booleans())
    def reload(self, data: Any, low: bool) -> None:
        """A fresh base, perhaps in another dtype or with other rows for new words, and one adapter from a file."""
        with self.counted("reload"):
            path, facts, rest = self.path(data)
            name = data.draw(st.sampled_from(list(NAMES)))
            if (masked("L15") and name.startswith("smoa_")) or (
                masked("L13") and name in ("0", "1", "mlp", "weight", "down")
            ):
                return
            dtype = (
                self.dtype if self.kind == "golden" else data.draw(st.sampled_from([self.dtype, "float64", "bfloat16"]))
            )
            low = low and not (masked("L9") and dtype == "bfloat16")
            self.dtype, table = dtype, [key for key in rest if key.endswith("embed_tokens.weight")]
            if self.traits.get("resized") and table:
                self.traits["resized"] = 2
            self.begin_model()
            given = f"adapter_name={name!r}, low_cpu_mem_usage={low}"
            self.run(f"m = PeftModel.from_pretrained(b, {self.shown_path(path)}, {given})")
            self.oracle.adapters, self.active, self.merged_now = {name: self.in_dtype(facts)}, [name], []
            for key, tensor in rest.items():
                if key.endswith(".bias"):
                    self.oracle.state[key] = tensor.to(self.oracle.state[key].dtype)
                if key in table and self.traits.get("resized"):
                    self.oracle.state[key] = tensor.to(self.oracle.state[key].dtype)
                    if self.traits.get("tied"):
                        self.oracle.state["lm_head.weight"] = self.oracle.state[key]
            has_head = "lm_head.weight" in rest or facts.copies or self.traits.get("tied")
            if (
                self.traits.get("resized") and table and not has_head
            ):  # L9: PEFT saves the table that was targeted alone
                self.oracle.state["lm_head.weight"] = self.m.state_dict()[self.key_of("lm_head.weight")].clone()
            self.check()

    def key_of(self, name: str) -> str:
        return next(key for key in self.m.state_dict() if plain(key) == name and ".modules_to_save." not in key)

    @precondition(
        lambda self: self.can("broken_file") and self.saved and len(self.oracle.adapters) < 4 and not self.merged_now
    )
    @rule(data=st.data(), what=st.sampled_from(["nan", "lacks", "short"]), low=st.booleans())
    def broken_file(self, data: Any, what: str, low: bool) -> None:
        with self.counted("broken_file"):
            path, facts, _ = self.path(data)
            new = f"{self.folder}/broken{len(self.ran)}"
            shutil.copytree(path, new, ignore=lambda folder, names: [n for n in names if Path(folder, n).is_dir()])
            tensors = load_file(f"{new}/adapter_model.safetensors")
            key = data.draw(st.sampled_from(sorted(key for key in tensors if ".smoa_" in key)))
            key = key.replace("labels", "block_scale").replace("smoa_row_", "smoa_").replace("smoa_col_", "smoa_")
            if what == "nan":
                tensors[key].view(-1)[0] = float("nan")
            elif what == "lacks":
                del tensors[key]
            else:
                tensors[key] = tensors[key].flatten()[:-1].clone()
            save_file(tensors, f"{new}/adapter_model.safetensors")
            name = data.draw(st.sampled_from(self.names()))
            if facts.config.get("bias", "none") != "none" or facts.copies:
                return
            line = f"m.load_adapter({self.shown_path(new)}, {name!r}, low_cpu_mem_usage={low})  # {what} in {key}"
            self.attempt(line, MUST_REFUSE)
            self.check()

    # The model as a whole.

    @precondition(lambda self: self.can("deepcopy"))
    @rule()
    def deepcopy(self) -> None:
        with self.counted("deepcopy"):
            self.run("m = copy.deepcopy(m)")
            self.check()

    @precondition(lambda self: self.can("assign") and not self.merged_now)
    @rule()
    def assign(self) -> None:
        with self.counted("assign"):
            if masked("L1") and self.kind == "golden":
                return
            self.run("m.load_state_dict({n: t.clone() for n, t in m.state_dict().items()}, assign=True)")
            self.check()

    @precondition(lambda self: self.can("compile") and self.kind == "llama" and not masked("L14"))
    @rule()
    def compile(self) -> None:
        with self.counted("compile"):
            layers = self.m.base_model.model.model.layers
            if isinstance(layers[0], torch._dynamo.OptimizedModule):
                return
            self.run("l = m.base_model.model.model.layers; l[0] = torch.compile(l[0])")
            self.check()

    @precondition(
        lambda self: self.can("not_a_number") and not self.merged_now and not masked("L24") and self.kind != "golden"
    )
    @rule(data=st.data(), value=st.sampled_from(["nan", "inf"]))
    def not_a_number(self, data: Any, value: str) -> None:
        """A factor that holds NaN: a safe merge is refused, and any other gives every bit of the base back."""
        with self.counted("not_a_number"):
            keys = [n for n, p in self.m.named_parameters() if ".smoa_B." in n and p.numel()]
            key = data.draw(st.sampled_from(sorted(keys)))
            self.run(f"p = m.get_parameter({key!r}); old = p.detach().clone(); p.data.view(-1)[0] = float({value!r})")
            if data.draw(st.booleans()):
                self.attempt("m.merge_adapter(safe_merge=True)", MAY_REFUSE)
            elif self.merge_refusal() == NO_REFUSAL:
                self.run("m.merge_adapter()")
            self.run("m.unmerge_adapter(); p.data.copy_(old)")
            self.check()

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None:
            FIRST.append(time.monotonic())
        for pair in combinations(sorted(set(self.ran)), 2):
            PAIRS[pair] += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        OPEN.clear()
        torch.compiler.set_stance("default")


def shown(config: dict[str, Any]) -> str:
    return f"SmoaConfig({', '.join(f'{name}={value!r}' for name, value in config.items())})"


def both_ways(config: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """Whether no layer is a target as a module in one config and as a parameter in another."""
    modules = {name for each in (config, *others) for name in each.get("target_modules") or []}
    parameters = {
        name.removesuffix(".weight") for each in (config, *others) for name in each.get("target_parameters") or []
    }
    return modules.isdisjoint(parameters)


def logits(out: Any) -> Tensor:
    return getattr(out, "logits", out)  # type: ignore[no-any-return]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits (NaN is NaN)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


Rule = Callable[..., None]
