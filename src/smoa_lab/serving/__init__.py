"""`smoa serve`, which replaces private parts of transformers' server and continuous batching."""

import importlib

import transformers

from smoa.errors import UnsupportedVersionError

RELEASE = "5.24"
"""The release of transformers that has these parts, and that the tests pass with."""

for package in ("fastapi", "openai", "uvicorn"):  # without them transformers' modules fail by a NameError
    importlib.import_module(package)
if not transformers.__version__.startswith(f"{RELEASE}."):
    raise UnsupportedVersionError(
        f"smoa serve: is for transformers {RELEASE}, whose private parts it replaces; "
        f"{transformers.__version__} is installed: pip install 'transformers[serving]=={RELEASE}.*'"
    )
