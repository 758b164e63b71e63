"""What a machine offers to training: free memory, a GPU, and instructions for bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch


@dataclass(frozen=True)
class Machine:
    """``memory``: bytes that are free where the model will be; ``gpu``: its name, if there is one; ``bfloat16``:
    whether it computes in bfloat16 rather than imitating it."""

    memory: int
    gpu: str | None = None
    bfloat16: bool = False

    @property
    def name(self) -> str:
        """The machine in a few words."""
        return self.gpu or "the CPU"


def this_machine() -> Machine:
    """The machine that runs this, with its first GPU if it has one."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Machine(free, torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False))
    return Machine(psutil.virtual_memory().available, None, _cpu_has_bfloat16())


def _cpu_has_bfloat16() -> bool:
    """AVX512, AMX or ARM instructions; unknown, and so false, to a torch that does not list what the CPU can do."""
    listed: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found and name.endswith("bf16") for name, found in listed.items())
