"""The lab: trains, scores, compares, inspects, merges and converts adapters; the `smoa` command."""

import warnings

# Of PEFT, TRL and transformers about each other: neither a user nor the lab can do anything about it.
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated")
