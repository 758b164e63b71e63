"""Registers SMoA with PEFT and checks PEFT's version. No other file adds to PEFT's tables.

PEFT has no plugin entry point, and `register_peft_method` refuses a name that is not a member of the `PeftType` enum.
So a real member is added to the enum, once.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from enum import Enum
from typing import Any

import peft
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from smoa.errors import UnsupportedVersionError

NAME = "SMOA"
NEXT_PEFT = "0.22"
SUPPORTED_PEFT = SpecifierSet(f">=0.18.1,<{NEXT_PEFT}")


def check_peft_version(version: str | None = None) -> None:
    """Refuse a PEFT older than the supported ones, and warn of a newer one."""
    installed = version or importlib.metadata.version("peft")
    base = Version(Version(installed).base_version)
    if base in SUPPORTED_PEFT:
        return
    if base >= Version(NEXT_PEFT):
        warnings.warn(
            f"smoa is tested with peft {SUPPORTED_PEFT}, found {installed}: some calls may fail", stacklevel=3
        )
    else:
        raise UnsupportedVersionError(
            f"smoa supports peft {SUPPORTED_PEFT}, found {installed} in {peft.__path__[0]}; "
            f"run: pip install 'peft{SUPPORTED_PEFT}'"
        )


def ensure_peft_type() -> None:
    """Add the member `PeftType.SMOA` unless it exists, and check that the enum has it."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        attributes = {"_name_": NAME, "_value_": NAME, "__objclass__": PeftType, "_sort_order_": len(PeftType)}
        for attribute, value in attributes.items():
            setattr(member, attribute, value)
        type.__setattr__(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        hashable: list[str] = getattr(PeftType, "_hashable_values_", [])  # Python ≥ 3.12
        hashable.append(NAME)
    added: Any = PeftType(NAME)
    same = added is getattr(PeftType, NAME) and added in list(PeftType) and isinstance(added, Enum)
    if not same or added.value != NAME:
        raise UnsupportedVersionError(
            f"could not add {NAME} to PeftType: PEFT has changed its enum; install another peft{SUPPORTED_PEFT}"
        )


def register(config_cls: type, model_cls: type) -> None:
    """Enter SMoA into PEFT's tables. A reloaded smoa replaces its earlier entries."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(NAME))
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    elif known.__module__ != model_cls.__module__:
        raise UnsupportedVersionError(
            f"PEFT already has a method {NAME}, from {known.__module__}; uninstall one of them"
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(NAME)] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType(NAME)] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(NAME)] = f"{NAME.lower()}_"
