"""Keeps notes of imported libraries out of what the ``smoa`` command prints. Imports nothing of smoa."""

from __future__ import annotations

import logging
import sys

NOTES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "DeepSpeed": "Setting accelerator to CPU",
}
"""What libraries log when PEFT and accelerate import them, or in every layer, by logger. It does not concern what the
user asked for; DeepSpeed's goes to stdout, into the middle of JSON."""


def quiet_imports() -> None:
    """Drop NOTES, and nothing else, from the log of the ``smoa`` command and of the lab."""
    for name in NOTES:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    # While Python imports this package to find the `__main__` of `python -m smoa`, `sys.argv` begins with `-m`
    in_the_lab = "smoa_lab" in sys.modules or sys.argv[:1] == ["-m"]
    return not (in_the_lab and record.getMessage().startswith(NOTES[record.name]))
