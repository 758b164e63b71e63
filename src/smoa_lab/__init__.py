"""The lab: trains, scores, compares, inspects, merges and converts adapters; the `smoa` command."""

import logging
import warnings

NOTES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "DeepSpeed": "Setting accelerator to CPU",
}
"""What libraries log when PEFT and accelerate import them, or in every layer, by logger. It does not concern what the
user asked for; DeepSpeed's goes to stdout, into the middle of JSON."""


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOTES[record.name])


for _name in NOTES:
    logging.getLogger(_name).addFilter(_is_news)
# Of PEFT, TRL and transformers about each other: neither a user nor the lab can do anything about it.
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated")
