"""The exception tree. Every error of smoa's own is a SmoaError and, besides, the builtin that fits.

SmoaError
├── ConfigError(ValueError)              a configuration value breaks a rule that the config alone can check
├── PartitionError(ValueError)           a spectral partition doesn't fit its layer
├── UnsupportedModuleError(TypeError)    the target module is of a kind that SMoA can't adapt
├── AdapterFileError(ValueError)         the tensors of a saved adapter don't fit the model
├── MergeError(ValueError)               merging, unmerging or combining adapters can't be done safely
├── DataError(ValueError)                a data set, task or record is not as it must be
└── UnsupportedVersionError(ImportError) the installed PEFT is not one that this release supports
"""

from __future__ import annotations

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "DataError",
    "MergeError",
    "PartitionError",
    "SmoaError",
    "UnsupportedModuleError",
    "UnsupportedVersionError",
]


class SmoaError(Exception):
    """Base of all errors that smoa raises on purpose."""


class ConfigError(SmoaError, ValueError):
    """A configuration value breaks a rule that the configuration alone can check."""


class PartitionError(SmoaError, ValueError):
    """A spectral partition does not fit the layer or is not a partition."""


class UnsupportedModuleError(SmoaError, TypeError):
    """The target module is of a kind that SMoA cannot adapt."""


class AdapterFileError(SmoaError, ValueError):
    """The tensors of a saved adapter are missing, superfluous or do not fit the model."""


class MergeError(SmoaError, ValueError):
    """Merging, unmerging or combining adapters cannot be done safely."""


class DataError(SmoaError, ValueError):
    """A data set, task or record is not as it must be."""


class UnsupportedVersionError(SmoaError, ImportError):
    """The installed version of a required library is not supported."""
