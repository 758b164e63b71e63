"""The names of transformers that the server needs are looked for before anything else."""

from __future__ import annotations

import importlib

import pytest

from smoa.errors import UnsupportedVersionError

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("transformers", minversion="5.24")

import smoa_lab.serving
from smoa_lab.serving import names


@pytest.mark.parametrize(
    ("name", "wanted", "lacking"),
    [
        ("transformers.generation.nowhere:Manager", (), "nowhere:Manager"),
        ("transformers.cli.serving.utils:NoManager.start", (), "NoManager.start"),
        ("transformers.cli.serving.utils:GenerationState.get_manager", ("model_id", "speed"), "get_manager with speed"),
        (f"{names.BATCHING}.scheduler:Scheduler", ("active_requests", "lost_requests"), "Scheduler with lost_requests"),
    ],
)
def test_an_older_transformers_is_one_clear_error(
    name: str, wanted: tuple[str, ...], lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(names.NAMES, name, wanted)
    with pytest.raises(UnsupportedVersionError, match=f"lacks .*{lacking}; it was tried with transformers 5.24"):
        importlib.reload(smoa_lab.serving)


def test_a_missing_package_is_no_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.NAMES, "nowhere.to_be_found:Name", ())
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        names.check()
