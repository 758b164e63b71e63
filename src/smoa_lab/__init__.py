"""The lab: trains, scores, compares, inspects, merges and converts adapters; the `smoa` command."""

import logging
import warnings

QUIET = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "DeepSpeed")
"""Loggers that tell at import or in every layer what does not concern what the user asked for; DeepSpeed's writes to
stdout, into the middle of JSON. Only their errors are shown."""
for _name in QUIET:
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.ERROR)
# Of PEFT, TRL and transformers about each other: neither a user nor the lab can do anything about it.
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated")
