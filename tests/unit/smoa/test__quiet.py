from __future__ import annotations

import subprocess
import sys

import pytest

NOTES = """
import logging, sys
from smoa._quiet import IMPORT_NOTES
for name, note in IMPORT_NOTES.items():
    logging.getLogger(name).warning(note + ": an end that changes")
    logging.getLogger(name).warning(name + " has news")
"""
NEWS = "bitsandbytes.backends.cpu.ops has news\nDeepSpeed has news\n"


def printed(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("first", ["import smoa_lab", "import smoa, smoa_lab.config.methods"])
def test_in_the_lab_only_the_known_notes_of_imported_libraries_are_dropped(first: str) -> None:
    found = printed("-c", first + NOTES)
    assert found.endswith(NEWS)
    assert "an end that changes" not in found


def test_a_program_that_only_uses_the_library_gets_every_note() -> None:
    assert printed("-c", NOTES).count("an end that changes") == 2


def test_python_m_smoa_prints_only_its_own_lines() -> None:
    assert printed("-m", "smoa", "data", "list").startswith("task ")


def test_the_lab_does_not_say_that_deepspeed_found_no_gpu() -> None:
    pytest.importorskip("deepspeed")
    found = printed("-c", "import smoa_lab, smoa; from deepspeed.accelerator import get_accelerator; get_accelerator()")
    assert "Setting accelerator" not in found
