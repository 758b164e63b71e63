"""SMoA, the Spectrum Modulation Adapter (arXiv:2605.21147), as a PEFT method.

`import smoa` registers the method with PEFT: `get_peft_model(base, SmoaConfig(...))` and `PeftModel.from_pretrained`
then work as for any method.
"""

from __future__ import annotations

from smoa.registration import ensure_peft_type, register

ensure_peft_type()

from smoa.compat import save_as_later_versions  # noqa: E402
from smoa.config import SmoaConfig  # noqa: E402  (PeftType.SMOA must exist before the config is defined)
from smoa.errors import (  # noqa: E402
    AdapterFileError,
    ConfigError,
    DataError,
    MergeError,
    PartitionError,
    SmoaError,
    UnsupportedModuleError,
)
from smoa.generation import keep_in_generate  # noqa: E402
from smoa.merged import merged  # noqa: E402
from smoa.model import SmoaModel  # noqa: E402
from smoa.partition import Blocks as SpectralPartition  # noqa: E402  (its public name)
from smoa.scores import clear_spectrum_cache  # noqa: E402
from smoa.spectrum import make_partition, register_partition, spectral_scores  # noqa: E402

register(SmoaConfig, SmoaModel)
save_as_later_versions()

__version__ = "0.2.0"

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "DataError",
    "MergeError",
    "PartitionError",
    "SmoaConfig",
    "SmoaError",
    "SmoaModel",
    "SpectralPartition",
    "UnsupportedModuleError",
    "clear_spectrum_cache",
    "keep_in_generate",
    "make_partition",
    "merged",
    "register_partition",
    "spectral_scores",
]
