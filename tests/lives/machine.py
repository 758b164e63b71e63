"""The machine: each rule is a line of user code, run in `space`, and what it did is held against the oracle.

A failing example prints its lines as a script. What PEFT itself refuses or gets wrong, LoRA's too, is not drawn.
"""

import copy
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from functools import cache
from itertools import combinations
from typing import Any

import peft
import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor
from torch.func import functional_call

import smoa
from smoa import SmoaConfig, SmoaError
from smoa.adapter_names import OPEN
from smoa.hotswap import hotswap_adapter
from tests.lives.bases import WORDS, base, parted
from tests.lives.facts import PARTS, Facts, Oracle, of_file, parameters, plain, read

EXAMPLES, COUNTS = [0], Counter[str]()
PAIRS = Counter[tuple[str, str]]()
"""How many examples ran, how often each rule ran, and in how many examples each pair of rules did."""
FIRST: list[float] = []
"""When the first example failed."""
END = [float("inf")]
"""When no more examples are begun."""
NAMES = ("a", "b", "ab", "c", "d")
# Six steps that add 0.1 to each factor: 0.085 in bfloat16; two with alpha / r = 5: 0.18, where float32 has 4e-6.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 0.12}
SCRIPT = """import copy, smoa, torch
from contextlib import suppress
from peft import PeftModel, get_peft_model
from smoa import SmoaConfig
from smoa.hotswap import hotswap_adapter
from tests.lives.bases import base
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
EVERY = ("mini", "llama", "mixture")
RULES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "save": (EVERY, set()), "add": (EVERY, set()), "merge": (EVERY, set()), "load": (EVERY, {"save"}),
    "load_over": (EVERY, {"save", "add"}), "set_adapter": (EVERY, {"add"}), "disable": (EVERY, set()),
    "train": (EVERY, set()),
    "mode": (EVERY, set()), "write_between": (EVERY, set()), "by_names": (("mini", "llama"), set()),
    "generate": (("llama", "mixture"), set()), "weighted": (EVERY, {"add"}), "unmerge": (EVERY, {"merge"}),
    "merged": (EVERY, set()), "unload": (EVERY, set()), "delete": (EVERY, {"add"}), "hotswap": (EVERY, {"save", "add"}),
    "reload": (EVERY, {"save"}), "deepcopy": (EVERY, set()), "assign": (EVERY, set()),
    "not_a_number": (EVERY, set()),
}  # fmt: skip
"""The kinds of base that a rule runs on, and the rules that go before it."""
UNMERGED = {"train", "write_between", "by_names", "generate", "weighted", "merged", "unload", "assign", "not_a_number"}
PEFTS_OWN = {
    "copies": "modules_to_save: one adapter's copy at a time, none of an adapted layer, none loaded while merged",
    "biases": "a second adapter that trains biases is refused",
    "both ways": "a module that is a target in one adapter and its parameter in another",
    "ends": "adapters on the ends of tied weights: a merge into one changes the other",
    "of parameters": "a batch by names is refused where parameters are adapted",
    "other settings": "a load over a name keeps its config",
    "tables": "an embedding that is a target is saved with its table, which takes its place in another base",
}
"""What the machine passes over: PEFT's own rules and faults, LoRA's too."""
NO_REFUSAL, MAY_REFUSE, MUST_REFUSE = "no refusal", "may refuse", "must refuse"


def rarely(draw: Any, times: int) -> bool:
    """Once in so many times; a shorter example has none."""
    return bool(draw(st.integers(1, times)) == times)


@st.composite
def settings_of(draw: Any, kind: str, tied: bool, in_words: bool) -> dict[str, Any]:
    """Settings of an adapter that a base takes; `in_words` allows what goes beyond layers (copies, biases)."""
    targets = draw(st.sets(st.sampled_from(TARGETS[kind]), min_size=0, max_size=3))
    parameters = draw(st.sets(st.sampled_from(PARAMETERS[kind]), max_size=2))
    parameters = {each for each in parameters if each.removesuffix(".weight") not in targets}
    if parameters and kind == "mixture":  # PEFT's own: one name for the wrapper of either
        parameters = {*PARAMETERS[kind]}
    if tied:  # PEFT's own: ends
        targets -= {"embed_tokens", "lm_head"}
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
    if rarely(draw, 4):
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
            "hotswap_adapter": hotswap_adapter, "suppress": suppress,
        }  # fmt: skip
        self.lines: list[str] = []
        self.ran: list[str] = []
        self.saved: list[tuple[str, Facts, dict[str, Tensor]]] = []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *args: None)  # a tenth of the time
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

    # The state.

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        if time.process_time() > END[0]:
            pytest.skip("the time is over")
        draw = data.draw
        two = draw(st.sampled_from([*combinations(RULES, 2)]))
        more = draw(st.sets(st.sampled_from([*RULES]), min_size=3, max_size=6))
        self.kind = draw(st.sampled_from([kind for kind in EVERY if all(kind in RULES[each][0] for each in two)]))
        swarm = {*two, *more}.union(*(RULES[each][1] for each in {*two, *more}))
        self.swarm = [each for each, (kinds, _) in RULES.items() if each in swarm and self.kind in kinds]
        self.dtype = draw(st.sampled_from(["float64", "float64", "float64", "float32", "bfloat16"]))
        self.traits: dict[str, Any] = {}
        if rarely(draw, 4):
            self.traits["tied"] = True
        if self.kind == "mixture":
            self.dtype = draw(st.sampled_from(["float64", "float32"]))
        self.begin_model()
        self.merged_now, self.active = [], []
        self.ids = torch.randint(1, WORDS, (3, 5), generator=torch.Generator().manual_seed(1))
        self.space["ids"] = self.ids
        name = draw(self.names())
        config = draw(settings_of(self.kind, bool(self.traits.get("tied")), rarely(draw, 3)))
        self.run(f"m = get_peft_model(b, {shown(config)}, adapter_name={name!r})")
        self.oracle.adapters[name] = read(self.m, name, config)
        self.wrapped = [config]
        self.active = list(self.oracle.adapters)

    def begin_model(self) -> None:
        given = ", ".join(f"{name}={value!r}" for name, value in {"dtype": self.dtype, **self.traits}.items())
        self.run(f"b = base({self.kind!r}, {given})")
        pure, state, self.own_dtype = known_base(self.kind, self.dtype, **self.traits)
        self.oracle = Oracle(pure, dict(state))

    def names(self, fresh: bool = False) -> st.SearchStrategy[str]:
        """Names that an adapter may have."""
        known = set() if fresh else getattr(self, "oracle", Oracle(None, {})).adapters.keys()
        return st.sampled_from([name for name in NAMES if name not in known])

    @property
    def facts(self) -> list[Facts]:
        return [self.oracle.adapters[name] for name in self.active if name in self.oracle.adapters]

    def copied(self, names: list[str]) -> Facts | None:
        found = [self.oracle.adapters[name] for name in names if self.oracle.adapters[name].copies]
        return found[0] if found else None

    @property
    def tolerance(self) -> float:
        configs = [facts.config for facts in self.oracle.adapters.values()] if self.dtype == "bfloat16" else []
        scales = [(config.get("alpha") or 0) / (config.get("r") or 8) for config in configs]
        return TOLERANCE[self.dtype] * max([1.0, *(scale / 2 for scale in scales)])

    def close(self, found: Tensor, expected: Tensor, what: str, coarse: float = 0.0) -> None:
        found, expected = found.detach().double(), expected.detach()
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
        assert error <= max(self.tolerance, coarse), f"{what}: off by {error:.2e} of the largest"

    # After each rule.

    @rule(data=st.data())
    def act(self, data: Any) -> None:
        """One of the swarm's rules that can run now. Hypothesis would draw some rules far more often than others."""
        possible = [name for name in self.swarm if self.can(name)]
        if not possible:
            return
        turn, lines = len(self.ran) % len(possible), len(self.lines)  # the simplest examples take all in turn
        name = data.draw(st.sampled_from(possible[turn:] + possible[:turn]))
        getattr(self, name)(data.draw)
        if len(self.lines) > lines:
            COUNTS[name] += 1
            self.ran.append(name)
            self.check()

    def can(self, name: str) -> bool:
        several, adapters = len(self.oracle.adapters) > 1, self.oracle.adapters
        return not (
            (name in UNMERGED and self.merged_now)
            or ("save" in RULES[name][1] and not self.saved)
            or (name in ("add", "load") and len(adapters) > 3)
            or (name in ("weighted", "delete") and not several)
            or (name == "weighted" and len(adapters) > 4)
            or (name == "generate" and self.m.training)
            or (name == "by_names" and self.in_parameters)
        )

    @property
    def in_parameters(self) -> bool:
        names = [name for facts in self.oracle.adapters.values() for name in facts.layers]
        return any(self.oracle.parameter(name) == name for name in names)

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
                    if name in self.oracle.state and ".modules_to_save." not in key:
                        assert same(tensor, self.oracle.state[name]), f"the base's {name} is not as it was"
                if "disable" in self.swarm:
                    with m.disable_adapter():
                        found = logits(m(self.ids))
                    assert same(found, self.plain_output(self.ids)), "the disabled model is not the base"
            assert [module for module in m.modules() if module.training] == was
        for name, facts in self.oracle.adapters.items():
            found = read(m, name, facts.config).layers
            assert found.keys() == facts.layers.keys(), f"{name!r} is on {[*found]}, not {[*facts.layers]}"
            for layer, own in facts.layers.items():
                for part, tensor in own.items():
                    assert same(found[layer][part], tensor), f"{layer}.{part} of {name!r} is not as it was"

    def plain_output(self, ids: Tensor) -> Tensor:
        return logits(functional_call(self.own_dtype, self.oracle.state, (ids,), strict=False))

    # Rules.

    def add(self, draw: Any) -> None:
        name = draw(self.names())
        config = draw(settings_of(self.kind, bool(self.traits.get("tied")), False))
        if draw(st.booleans()):  # like one that is there but for a setting
            like = self.oracle.adapters[draw(st.sampled_from(sorted(self.oracle.adapters)))].config
            plain_like = {k: v for k, v in like.items() if k not in ("bias", "modules_to_save")}
            more = draw(st.sampled_from([{"alpha": 20.0}, {"modulation": "none"}, {"scale": "paper"}, {}]))
            config = {**plain_like, "init_weights": False, **more}
        both = {each.split(".")[0] for f in [config, *(f.config for f in self.oracle.adapters.values())]
                for each in (*(f.get("target_modules") or []), *(f.get("target_parameters") or []))}  # fmt: skip
        if "lm_head" in both and any("lm_head.original_module." in key for key in self.m.state_dict()):
            return  # PEFT's own: copies
        if not both_ways(config, self.wrapped):
            return  # PEFT's own: both ways
        self.run(f"m.add_adapter({name!r}, {shown(config)})")
        self.oracle.adapters[name] = read(self.m, name, config)
        self.wrapped.append(config)
        self.merged_now = []  # as PEFT: an adapter that is added unmerges

    def set_adapter(self, draw: Any) -> None:
        names = draw(st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=1, max_size=2, unique=True))
        if any(self.oracle.adapters[name].copies for name in names):
            names = names[:1]  # PEFT's own: copies
        self.run(f"m.set_adapter({names[0]!r})" if len(names) == 1 else f"m.base_model.set_adapter({names!r})")
        self.active, self.merged_now = names, []

    def disable(self, draw: Any) -> None:
        self.run("with m.disable_adapter(): y = m(ids)")
        self.merged_now = []  # as PEFT: disabling unmerges
        assert same(logits(self.space["y"]), self.plain_output(self.ids)), "the disabled model is not the base"

    def mode(self, draw: Any) -> None:
        self.run("m.train()" if draw(st.booleans()) else "m.eval()")

    def train(self, draw: Any, write: bool = False) -> None:
        """A step, sometimes by names."""
        if self.kind != "mixture" and not self.in_parameters and draw(st.booleans()):
            known = [name for name, facts in self.oracle.adapters.items() if not facts.copies]
            names = draw(st.lists(st.sampled_from(["__base__", *known]), min_size=3, max_size=3))
            of_rows = [[] if name == "__base__" else [name] for name in names]
            if any(of_rows) and not self.copied(self.active):
                self.run(f"m.base_model.set_requires_grad({sorted({*names} - {'__base__'})!r})")
                self.step(f"m(ids, adapter_names={names!r})", of_rows, write)
        else:
            self.step("m(ids)", [self.active] * len(self.ids), write)

    def write_between(self, draw: Any) -> None:
        self.train(draw, write=True)

    def by_names(self, draw: Any) -> None:
        known = [name for name, facts in self.oracle.adapters.items() if not facts.copies]
        names = draw(st.lists(st.sampled_from(["__base__", *known]), min_size=3, max_size=3))
        if self.copied(self.active):
            return  # PEFT's own: copies
        of_rows = [[] if name == "__base__" else [name] for name in names]
        call = f"m(ids, adapter_names={names!r})"
        self.run(f"with torch.no_grad(): y = {call}")
        if not (self.m.training and any(self.oracle.adapters[n].has_dropout for row in of_rows for n in row)):
            for i, row in enumerate(of_rows):
                expected = self.oracle.output(self.ids[i : i + 1], [self.oracle.adapters[n] for n in row])
                self.close(logits(self.space["y"])[i : i + 1], expected, f"row {i} of the batch by names")

    def step(self, call: str, of_rows: list[list[str]], write: bool) -> None:
        """A step of training, perhaps with factors written between forward and backward."""
        used = sorted({name for row in of_rows for name in row})
        facts = {name: self.oracle.adapters[name] for name in used}
        if any(f.copies for f in facts.values()):
            return
        random = self.m.training and any(f.has_dropout for f in facts.values())
        self.run(f"m.zero_grad(); y = {call}; y = getattr(y, 'logits', y)")
        y = self.space["y"]
        if not y.requires_grad:
            return
        cotangent = self.space["g"] = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        self.lines.append("g = torch.randn(y.shape).to(y.dtype)")
        if write:
            by = 0.1 if self.dtype == "float64" else 0.01  # a model this small multiplies what 16 bits round
            self.run(f"with torch.no_grad(): [p.add_({by}) for p in m.parameters() if p.requires_grad]")
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
                            self.close(found.grad, gradient, f"gradient of {layer}.{part}", 4 * self.tolerance)
        self.run(
            "with torch.no_grad(): [p.sub_(0.02 * p.grad.clamp(-1, 1)) for p in m.parameters() if p.grad is not None]"
        )
        for name in self.oracle.adapters:
            self.oracle.adapters[name] = read(self.m, name, self.oracle.adapters[name].config)
        for key, parameter in self.m.named_parameters(remove_duplicate=False):
            name = plain(key)  # biases train on when another adapter is active
            if name in self.oracle.state and name.endswith(".bias") and parameter.requires_grad:
                self.oracle.state[name] = parameter.detach().clone()

    def parameter(self, parameters: dict[str, Any], layer: str, part: str, name: str) -> Any:
        head, _, tail = part.partition(".")
        own = layer.rpartition(".")[0] if self.oracle.parameter(layer) == layer else layer
        ends = f".{head}.{name}.{tail}"
        found = [tensor for key, tensor in parameters.items() if key.endswith(ends) and plain(key) == own + ends]
        return found[0] if len(found) == 1 else None  # of two parameters of one module it can't be told here

    def generate(self, draw: Any) -> None:
        times, names, more = draw(st.integers(1, 2)), None, ""
        known = [name for name, facts in self.oracle.adapters.items() if not facts.copies]
        if known and not self.in_parameters and not self.copied(self.active) and draw(st.booleans()):
            names = draw(st.lists(st.sampled_from(["__base__", *known]), min_size=3, max_size=3))
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

    def weighted(self, draw: Any) -> None:
        names = draw(st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=2, max_size=2))
        new = draw(self.names())
        parts = [self.oracle.adapters[name] for name in names]
        line = f"m.add_weighted_adapter({names!r}, [0.7, -1.2], {new!r}, combination_type='cat')"
        if self.attempt(line, MAY_REFUSE):
            r = sum(part.config["r"] for part in parts)
            config = {**parts[0].config, "r": r, "alpha": None, "scale": "paper"}
            self.oracle.adapters[new], self.merged_now = read(self.m, new, config), []
            for layer in parts[0].layers:
                sums = 0.7 * self.oracle.delta(parts[0], layer) - 1.2 * self.oracle.delta(parts[1], layer)
                self.close(self.oracle.delta(self.oracle.adapters[new], layer), sums, f"sum in {layer}")

    def merge(self, draw: Any) -> None:
        one = st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=1, max_size=2, unique=True)
        names = draw(one) if draw(st.booleans()) and not self.copied(self.active) else None
        safe = draw(st.booleans())
        self.run(f"m.merge_adapter(adapter_names={names!r}, safe_merge={safe})")
        known = [name for name, _ in self.merged_now]
        chosen = self.active if names is None else names
        self.merged_now += [(name, self.oracle.adapters[name]) for name in chosen if name not in known]

    def unmerge(self, draw: Any) -> None:
        self.run("m.unmerge_adapter()")
        self.merged_now = []

    def merged(self, draw: Any) -> None:
        self.run("with smoa.merged(m), torch.no_grad(): y = m(ids)")
        expected = self.oracle.output(self.ids, self.facts, self.copied(self.active))
        self.close(logits(self.space["y"]), expected, "output within smoa.merged")

    def unload(self, draw: Any) -> None:
        merges = draw(st.booleans()) or bool(self.copied(self.active))
        line = f"u = copy.deepcopy(m).{'merge_and_unload' if merges else 'unload'}(); y = u(ids)"
        self.run(f"with torch.no_grad(): {line}")
        found = logits(self.space["y"])
        if merges:
            expected = self.oracle.output(self.ids, self.facts, self.copied(self.active))
            self.close(found, expected, "output of the merged base")
        else:
            assert same(found, self.plain_output(self.ids)), "the unloaded model is not the base"

    def delete(self, draw: Any) -> None:
        name = draw(st.sampled_from(sorted(self.oracle.adapters)))
        if name in [known for known, _ in self.merged_now]:
            self.attempt(f"m.delete_adapter({name!r})", MAY_REFUSE)
            return
        must_choose = name in self.active or name == self.m.active_adapter
        self.run(f"m.delete_adapter({name!r})")
        del self.oracle.adapters[name]
        if must_choose:
            self.active, self.merged_now = [sorted(self.oracle.adapters)[0]], []
            self.run(f"m.set_adapter({self.active[0]!r})")

    # Files.

    def save(self, draw: Any) -> None:
        folder = f"{len(self.saved)}_{len(self.lines)}"
        tables = draw(st.sampled_from(["'auto'", "'auto'", "False"]))
        tables = "False" if self.merged_now else tables  # PEFT's own: tables
        every = sorted(self.oracle.adapters)
        some = draw(st.sets(st.sampled_from(every), min_size=1)) if draw(st.booleans()) else every
        chosen = "" if some is every else f", selected_adapters={sorted(some)!r}"
        self.run(f"m.save_pretrained(d + '/{folder}', save_embedding_layers={tables}{chosen})")
        for name, facts in self.oracle.adapters.items():
            if name not in some:
                continue
            path = f"{self.folder}/{folder}" + ("" if name == "default" else f"/{name}")
            found, rest = of_file(path, facts.config, facts.copies, parameters(self.m))
            assert found.layers.keys() == facts.layers.keys(), f"saved {[*found.layers]}, not {[*facts.layers]}"
            for layer, own in facts.layers.items():
                for part, tensor in own.items():
                    assert same(found.layers[layer][part], tensor), f"{layer}.{part} is not what was saved"
            for key, tensor in facts.copies.items():
                assert same(found.copies[key], tensor), f"the copy of {key} is not what was saved"
            if has_bias(facts):
                trained = {f"{layer}.bias" for layer in facts.layers} & self.oracle.state.keys()
                assert trained <= rest.keys(), f"{sorted(trained - rest.keys())} are not saved"
            for key, tensor in rest.items():
                if key in self.oracle.state:
                    assert same(tensor, self.oracle.state[key]), f"the saved {key} is not the base's"
            self.saved.append((path, found, rest))

    def path(self, draw: Any) -> tuple[str, Facts, dict[str, Tensor]]:
        return self.saved[draw(st.integers(0, len(self.saved) - 1))]

    def shown_path(self, path: str) -> str:
        return f"d + {path.removeprefix(self.folder)!r}"

    def load(self, draw: Any) -> None:
        path, facts, rest = self.path(draw)
        low, trains = draw(st.booleans()) and self.keeps_dtype(facts), draw(st.booleans())
        name = draw(self.names())
        given = f"low_cpu_mem_usage={low}, is_trainable={trains}"
        if has_bias(facts) and any(has_bias(f) for f in self.oracle.adapters.values()):
            return  # PEFT's own: biases
        if facts.copies and self.merged_now:
            return  # PEFT's own: copies
        if not both_ways(facts.config, self.wrapped):
            return  # PEFT's own: both ways
        self.run(f"m.load_adapter({self.shown_path(path)}, {name!r}, {given})")
        self.oracle.adapters[name] = self.in_dtype(facts)
        self.wrapped.append(facts.config)
        self.take_biases(rest)
        self.merged_now = []

    def take_biases(self, rest: dict[str, Tensor]) -> None:
        for key, tensor in rest.items():
            if key.endswith(".bias"):
                self.oracle.state[key] = tensor.to(self.oracle.state[key].dtype)

    def keeps_dtype(self, facts: Facts) -> bool:
        """Whether tensors are loaded in the file's dtype in any way: with low_cpu_mem_usage PEFT keeps it."""
        if has_bias(facts) or facts.copies:
            return False
        return all(
            tensor.dtype == own[part].dtype
            for layer, own in self.in_dtype(facts).layers.items()
            for part, tensor in facts.layers[layer].items()
        )

    def in_dtype(self, facts: Facts) -> Facts:
        """As it is loaded: PEFT has factors of 16 bits in float32, and others in the base's dtype."""
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        layers = {
            layer: {part: tensor.to(dtype) if part in PARTS[:2] else tensor for part, tensor in own.items()}
            for layer, own in facts.layers.items()
        }
        return Facts(facts.config, layers, {n: t.to(self.oracle.state[n].dtype) for n, t in facts.copies.items()})

    def load_over(self, draw: Any) -> None:
        name, low = draw(st.sampled_from(sorted(self.oracle.adapters))), draw(st.booleans())
        old = self.oracle.adapters[name]
        fitting = [each for each in self.saved if each[1].config == old.config]  # PEFT's own: other settings
        if not fitting or name in [known for known, _ in self.merged_now]:
            return
        path, facts, rest = draw(st.sampled_from(fitting))
        low = low and self.keeps_dtype(facts)
        if any(key.endswith(".bias") for key in rest) or facts.copies or old.copies:
            return
        if self.merged_now and any(key.endswith(("tokens.weight", "head.weight")) for key in rest):
            return  # PEFT's own: tables
        self.run(f"m.load_adapter({self.shown_path(path)}, {name!r}, low_cpu_mem_usage={low})")
        self.oracle.adapters[name] = self.in_dtype(facts)
        if name not in self.active and not self.merged_now and draw(st.booleans()):
            self.run(f"m.set_adapter({name!r})")
            self.active = [name]

    def hotswap(self, draw: Any) -> None:
        path, facts, rest = self.path(draw)
        if self.merged_now and any(key.endswith(("tokens.weight", "head.weight")) for key in rest):
            return  # PEFT's own: tables
        name = draw(st.sampled_from(sorted(self.oracle.adapters)))
        old = self.oracle.adapters[name]
        if facts.copies or old.copies or has_bias(facts):
            return
        is_merged = name in [known for known, _ in self.merged_now]
        refusal = MUST_REFUSE if is_merged else NO_REFUSAL if old.config == facts.config else MAY_REFUSE
        if self.attempt(f"hotswap_adapter(m, {self.shown_path(path)}, {name!r})", refusal):
            kept = {key: value for key, value in old.config.items() if key != "scale"}
            config = kept | {key: value for key, value in facts.config.items() if key == "scale"}
            self.oracle.adapters[name] = new = read(self.m, name, config)
            for layer in old.layers:
                found = self.oracle.delta(new, layer)
                has = layer in facts.layers
                expected = self.oracle.delta(facts, layer) if has else torch.zeros_like(found)
                self.close(found, expected, f"ΔW of {layer} after hotswap")

    def reload(self, draw: Any) -> None:
        """A fresh base, perhaps in another dtype or with other rows for new words, and one adapter from a file."""
        path, facts, rest = self.path(draw)
        self.oracle.adapters, name = {}, draw(self.names(fresh=True))
        own, low = [self.dtype], draw(st.booleans())
        if not any(key.endswith(("tokens.weight", "head.weight")) for key in rest):  # PEFT's own: tables
            own += ["float64"] if self.kind == "mixture" else ["float64", "bfloat16"]  # rounding chooses other experts
        self.dtype = draw(st.sampled_from(own))
        low = low and self.keeps_dtype(facts)
        self.begin_model()
        given = f"adapter_name={name!r}, low_cpu_mem_usage={low}"
        self.run(f"m = PeftModel.from_pretrained(b, {self.shown_path(path)}, {given})")
        self.oracle.adapters, self.active, self.merged_now = {name: self.in_dtype(facts)}, [name], []
        self.wrapped = [facts.config]
        self.take_biases(rest)

    # The model as a whole.

    def deepcopy(self, draw: Any) -> None:
        self.run("m = copy.deepcopy(m)")

    def assign(self, draw: Any) -> None:
        self.run("m.load_state_dict({n: t.clone() for n, t in m.state_dict().items()}, assign=True)")

    def not_a_number(self, draw: Any) -> None:
        """A factor that holds NaN: a safe merge stops, and whatever was merged gives every bit of the base back."""
        keys = [n for n, p in self.m.named_parameters() if ".smoa_B." in n and p.numel()]
        key = draw(st.sampled_from(sorted(keys)))
        value = draw(st.sampled_from(["nan", "inf"]))
        self.run(f"p = m.get_parameter({key!r}); old = p.detach().clone(); p.data.view(-1)[0] = float({value!r})")
        safe = draw(st.booleans())
        self.run(f"with suppress(smoa.MergeError): m.merge_adapter(safe_merge={safe})")
        self.run("m.unmerge_adapter(); p.data.copy_(old)")

    def teardown(self) -> None:
        if isinstance(sys.exc_info()[1], Exception):
            FIRST.append(time.process_time())
        EXAMPLES[0] += 1
        for pair in combinations(sorted(set(self.ran)), 2):
            PAIRS[pair] += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        self.patch.undo()
        OPEN.clear()
        torch.compiler.set_stance("default")


@cache
def known_base(kind: str, dtype: str, **traits: Any) -> tuple[Any, dict[str, Tensor], Any]:
    """What a base is: in float64, its bits, and in its own dtype; none of them is ever written."""
    model = base(kind, dtype, **traits)
    state = {name: each.detach() for name, each in model.named_parameters(remove_duplicate=False)}
    return parted(model), state, parted(model).to(getattr(torch, dtype))


def has_bias(facts: Facts) -> bool:
    return bool(facts.config.get("bias", "none") != "none")


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
