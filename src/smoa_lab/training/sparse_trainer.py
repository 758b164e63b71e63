"""TRL's SFTTrainer with logits at trained tokens only.

Without Triton, as on a CPU, TRL computes the output layer at every position: of Gemma 3 270M, whose vocabulary has
262,144 tokens, a step on short questions takes twenty times as long.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F
from trl.trainer.sft_trainer import SFTTrainer

from smoa_lab.data.encoding import IGNORED
from smoa_lab.scoring.losses import answer_positions, logits_at, wanted_logits


class SparseSFTTrainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
    """Its loss is TRL's ``nll``; for every other one, and with an auxiliary loss, TRL computes it."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        arguments: Any = self.args
        if arguments.loss_type != "nll" or self.label_smoother or self.aux_loss_enabled or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call, unused-ignore]
        labels = inputs.pop("labels")
        targets, positions = labels[:, 1:][labels[:, 1:] != IGNORED], answer_positions(labels)
        with logits_at(self.accelerator.unwrap_model(model), positions):
            logits = wanted_logits(model(**{**inputs, "use_cache": False}).logits, positions)
        total = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")
        if model.training:
            mask = inputs.get("attention_mask")
            tokens = labels.new_tensor(labels.numel()) if mask is None else mask.sum()
            self._total_train_tokens += self.accelerator.gather_for_metrics(tokens).sum().item()
        self._metrics["train" if model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        if num_items_in_batch is None:
            return total / max(1, len(targets))
        across = self.accelerator.num_processes if arguments.average_tokens_across_devices else 1
        return total * across / num_items_in_batch
