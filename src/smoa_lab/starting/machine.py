"""What a machine offers to training: free memory, a GPU, and instructions for bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from smoa_lab.config.run import native_dtype


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
    bfloat16 = native_dtype() == "bfloat16"
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Machine(free, torch.cuda.get_device_name(), bfloat16)
    return Machine(psutil.virtual_memory().available, None, bfloat16)
