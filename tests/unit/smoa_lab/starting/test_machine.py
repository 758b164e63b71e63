from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from smoa_lab.config import run
from smoa_lab.starting.machine import Machine, this_machine

CPU_MULTIPLIES_BFLOAT16 = run.cpu_multiplies_bfloat16


@pytest.fixture(autouse=True)
def _a_cpu_with_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))


@pytest.mark.parametrize(
    ("listed", "has"),
    [({"avx512_bf16": True, "avx2": True}, True), ({"avx512_bf16": False, "avx512_f": True}, False), ({}, False)],
)
def test_a_cpu_has_bfloat16_if_it_lists_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, listed: dict[str, Any], has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed, raising=False)
    monkeypatch.setattr(run, "cpu_multiplies_bfloat16", CPU_MULTIPLIES_BFLOAT16)
    assert this_machine() == Machine(2**30, None, has)
    assert this_machine().name == "the CPU"


def test_a_torch_that_lists_no_instructions_is_taken_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not this_machine().bfloat16


def test_a_gpu_comes_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert this_machine() == Machine(7, "A GPU", True)
    assert this_machine().name == "A GPU"
