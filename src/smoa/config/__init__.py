"""What a user says about an adapter: a value that opens no file."""

from smoa.config.adapter_config import SmoaConfig

__all__ = ["SmoaConfig"]
