"""Approximates an adapter, or a run's, by a LoRA, and measures what that loses of ΔW and of the task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from smoa.atomic import check_place, new_folder
from smoa.conversion import RankRule, UpdateSpectra
from smoa.errors import ConfigError
from smoa_lab.base_models import described_base, load_base_model
from smoa_lab.config.run import load_config
from smoa_lab.open_run import adapter_config, adapter_of_run, base_section, with_saved_adapter
from smoa_lab.scoring.losses import Losses
from smoa_lab.training.loaded_run import LoadedRun, load_run
from smoa_lab.training.run_folder import RunFolder


class Converter:
    """A saved adapter on its base model: makes LoRAs of any rank from it, and scores them if the run's data is known.

    Raises:
        ConfigError: ``place`` is not the folder of an adapter or a run, or the adapter is not SMoA.
        DataError: base model or data cannot be loaded.
    """

    def __init__(self, place: str | Path, base: str | None = None, score: bool = True) -> None:
        self.source = adapter_of_run(place)
        kind = getattr(adapter_config(self.source).peft_type, "value", None)
        if kind != "SMOA":
            raise ConfigError(f"{self.source}: is an adapter of the type {kind}; only SMoA's are converted to LoRA")
        config = RunFolder(Path(place)).config
        self.run: LoadedRun | None = None
        if score and config.is_file():
            moved = [] if base is None else [f"model.name={json.dumps(base)}"]
            self.run = load_run(load_config(config, moved))
        section = base_section(self.source, base)
        self.base: Any = self.run.base if self.run else load_base_model(section)[0]
        self.base_losses = self._losses(self.base)
        with self._adapted(self.source) as model:
            self.spectra = UpdateSpectra(model)
            self.adapter_parameters = sum(p.numel() for name, p in model.named_parameters() if ".smoa_" in name)
            self.adapter_losses = self._losses(model)

    def cut(self, rule: RankRule, output: Path, uniform_rank: bool = False) -> dict[str, Any]:
        """Save a LoRA in the new folder ``output``, load it from there by PEFT, score it; its figures.

        ``loss`` has the mean negative log-likelihood, in nats, of a token over the run's held-out questions' gold
        answers, or rows: of the base, the adapter and the LoRA; what the conversion adds, question by question, with
        its standard error; and the share of the adapter's gain over the base that is kept, None without a gain.
        """
        conversion = self.spectra.to_lora(rule, uniform_rank)
        name = str(conversion.config.base_model_name_or_path)
        # A packaged base is in the cache folder, which no other machine has.
        conversion.config.base_model_name_or_path = described_base(name).hub_id or name
        conversion.save(output)
        loss = None
        if self.base_losses.nll:
            with self._adapted(output) as model:
                lora = self._losses(model)
            change = lora.change_from(self.adapter_losses)
            base, adapter = self.base_losses.mean, self.adapter_losses.mean
            loss = {
                "questions": len(lora.nll),
                "base": base,
                "adapter": adapter,
                "lora": lora.mean,
                "lora_change": change.mean,
                "lora_change_stderr": change.stderr,
                "gain_kept": (base - lora.mean) / (base - adapter) if adapter < base else None,
            }
        return {
            "rank": conversion.config.r,
            "error": conversion.error,
            "parameters": conversion.parameters,
            "blockwise_parameters": sum(layer.blockwise_parameters for layer in conversion.layers),
            "adapter_parameters": self.adapter_parameters,
            "loss": loss,
            "layers": [asdict(layer) for layer in conversion.layers],
        }

    @contextmanager
    def _adapted(self, adapter: Path) -> Iterator[PeftModel]:
        model = with_saved_adapter(self.base, adapter)
        model.eval()
        yield model
        self.base = model.unload()

    def _losses(self, model: nn.Module) -> Losses:
        """The losses of all gold answers or held-out rows; none if the run's data are not known."""
        return Losses([], []) if self.run is None else self.run.held_out_losses(model)


def convert_run(
    place: str | Path,
    output: str | Path,
    rule: RankRule,
    base: str | None = None,
    uniform_rank: bool = False,
    score: bool = True,
) -> dict[str, Any]:
    """Write the LoRA to ``output`` and return what it loses; of the task too if ``place`` is a run's folder.

    Raises:
        ConfigError: ``output`` exists, or ``place`` contains no SMoA adapter.
        DataError: base model or data cannot be loaded.
    """
    check_place(Path(output), is_new=True)
    converter = Converter(place, base, score)
    with new_folder(Path(output)) as temporary:
        return {"folder": str(output), **converter.cut(rule, temporary, uniform_rank)}
