"""The public path of an adapter's costs, computed from sizes alone."""

from __future__ import annotations

from smoa.maths.budget import TrainingMemory, adapter_bytes, rank_bound, trainable_parameters, training_memory

__all__ = ["TrainingMemory", "adapter_bytes", "rank_bound", "trainable_parameters", "training_memory"]
