"""Enters the forms of neighbours.py into PEFT as one method, ``neighbour``, and into the lab under names of their own,
so that the lab trains, scores and stores their runs as those of any other method: ``import peft_method`` is enough.

Methods of a run's ``method:`` and the keys of its ``adapter:``, beside ``target_modules``:

    bhra          r, blocks
    abba          r, alpha
    grid-control  r, blocks: BHRA without W
    lora-here     r, alpha: LoRA once more, by which the wiring is checked
    hira-here     r: HiRA once more, likewise
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from neighbours import Abba, Form, Grid, LowRank
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from smoa import registration
from smoa_lab.config.methods import PRESETS, Method

NAME = "NEIGHBOUR"
FORMS = ("lora", "bhra", "control", "abba")
FACTORS = ("A", "B", "A1", "B1", "A2", "B2")


@dataclass
class NeighbourConfig(PeftConfig):
    """What decides an adapter: one of the ``FORMS`` and its sizes."""

    form: str = "bhra"
    r: int = 8
    blocks: int = 1
    alpha: float = 16.0
    target_modules: Any = field(default=None)
    exclude_modules: Any = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(NAME)
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is none of {', '.join(FORMS)}")

    @property
    def made(self) -> Form:
        """The form with its sizes."""
        if self.form == "lora":
            return LowRank(self.r, self.alpha)
        if self.form == "abba":
            return Abba(self.r, self.alpha)
        return Grid(self.r, self.blocks, modulated=self.form == "bhra")


class NeighbourLayer(nn.Module, BaseTunerLayer):
    """A linear layer with one adapter. PEFT finds and saves its factors by ``neighbour_``."""

    adapter_layer_names = tuple(f"neighbour_{name}" for name in FACTORS)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, form: Form) -> None:
        super().__init__()
        self.base_layer, self.form = base_layer, form
        factors = form.start(base_layer.weight.detach())
        for name in FACTORS:
            own = {adapter_name: nn.Parameter(factors[name])} if name in factors else {}
            setattr(self, f"neighbour_{name}", nn.ParameterDict(own))
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.set_adapter([adapter_name])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        known = {name: getattr(self, f"neighbour_{name}") for name in FACTORS}
        factors = {name: own[self.active_adapters[0]] for name, own in known.items() if len(own)}
        return result + self.form.apply(x, factors, self.base_layer.weight)


class NeighbourModel(BaseTuner):
    """Replaces the linear layers that the config names."""

    prefix = "neighbour_"
    tuner_layer_cls = NeighbourLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - so PEFT declares it

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(target, nn.Linear):
            raise TypeError(f"{current_key}: only nn.Linear is adapted here, once")
        self._replace_module(parent, target_name, NeighbourLayer(target, adapter_name, peft_config.made), target)


def register() -> None:
    """Once a process, as smoa enters itself."""
    with patch.object(registration, "NAME", NAME):
        registration.ensure_peft_type()
        registration.register(NeighbourConfig, NeighbourModel)
    PRESETS["bhra"] = Method(NAME.lower(), {"form": "bhra"})
    PRESETS["abba"] = Method(NAME.lower(), {"form": "abba"})
    PRESETS["grid-control"] = Method(NAME.lower(), {"form": "control"})
    PRESETS["lora-here"] = Method(NAME.lower(), {"form": "lora"})
    PRESETS["hira-here"] = Method(NAME.lower(), {"form": "bhra", "blocks": 1})


register()
