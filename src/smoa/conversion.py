"""The public path of conversion to LoRA."""

from __future__ import annotations

from smoa.export.lora import ConvertedLayer, LoraConversion, RankRule, convert_to_lora

__all__ = ["ConvertedLayer", "LoraConversion", "RankRule", "convert_to_lora"]
