"""Adapters on their way out: merged models and LoRA."""

from smoa.export.merge import Export, merge_and_save

__all__ = ["Export", "merge_and_save"]
