"""The settings of an adapter."""

from smoa.config.adapter_config import SmoaConfig

__all__ = ["SmoaConfig"]
