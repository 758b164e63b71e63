"""How cards name a base model: by its Hub id, or a local one by its last name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it lists no exports


@dataclass(frozen=True)
class NamedBase:
    """A base model in words, and its id on the Hub, to which a card's front matter links, or None."""

    text: str
    hub_id: str | None


def named_base(source: str | None) -> NamedBase:
    """The name of a base that was loaded from `source`.

    Of a local folder or file only the last name: the rest is of this machine, and the Hub can't link to it.
    """
    if not source:
        return NamedBase("a model without a name", None)
    if _is_hub_id(source) and not source.endswith(".gguf") and not Path(source).exists():
        return NamedBase(source, source)
    return NamedBase(PureWindowsPath(source).name, None)  # splits at / and \


def _is_hub_id(source: str) -> bool:
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True
