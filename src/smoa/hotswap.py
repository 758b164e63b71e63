"""The public path of hot-swapping: loads a saved adapter in the place of a loaded one."""

from __future__ import annotations

from smoa.tuner.hotswap import hotswap_adapter

__all__ = ["hotswap_adapter"]
