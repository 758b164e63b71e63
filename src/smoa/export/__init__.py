"""Exports adapters, as merged models or as LoRA."""

from smoa.export.merge import Export, merge_and_save

__all__ = ["Export", "merge_and_save"]
