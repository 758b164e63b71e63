"""Opens what a command is given: a finished run, a config file, a saved adapter, or a model alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils.hub import CHAT_TEMPLATE_FILE

import smoa  # noqa: F401  (registers SMoA with PEFT)
from smoa import ConfigError
from smoa_lab.base_models import RunModel, base_content, packaged_name
from smoa_lab.basics.files import read_stored
from smoa_lab.config.run import Dtype, ModelSection, RunConfig, load_config
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

OF_FILES = 64
"""Characters of the hash of a base's files; for one of the Hub there is a commit, which is shorter."""


@dataclass(frozen=True)
class Opened:
    """What a command was given: the model, with its adapter if it has one; of a run or a config file the config, and of
    a run its folder."""

    place: Path
    model: RunModel
    config: RunConfig | None = None
    folder: RunFolder | None = None

    @property
    def adapter(self) -> Path:
        """The folder of the adapter; raises ConfigError if there is none."""
        if self.model.adapter is None:
            raise ConfigError(f"{self.place}: contains no adapter ({CONFIG_NAME}), nor does {self.place / 'adapter'}")
        return self.model.adapter

    def with_changes(self, dtype: Dtype | None, template: str | None) -> Opened:
        """The same, with a dtype or a template that the user gave."""
        section = self.model.section.model_copy(update={"dtype": dtype} if dtype else {})
        return replace(self, model=replace(self.model, section=section, template=template or self.model.template))

    @property
    def name(self) -> str:
        """What the run, or the adapter that lies in no run, is called."""
        return (self.place if self.folder is None else self.folder.path).resolve().name


def open_place(place: str | Path, base: str | None = None, overrides: Sequence[str] = ()) -> Opened:
    """Find what lies in ``place``; nothing is loaded yet.

    ``base`` is used instead of the base model that a run or an adapter names, and ``overrides`` are laid over a run's
    config. A run that trained the whole model has no adapter: its model is the trained one.
    """
    path = Path(place).expanduser()
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        config = _on(load_config(path, [*overrides]), base)
        return Opened(path, RunModel.of(config), config)
    folder = _run_of(path)
    if folder is not None:
        template = folder.adapter / CHAT_TEMPLATE_FILE  # as it was: a file that the config names may have changed
        config = load_config(folder.config, [f"data.template={template}"] * template.is_file() + [*overrides])
        config = _on(config, base)
        section = _as_trained_on(folder, config.model, base is not None)
        if config.method == "full":
            section = config.model.model_copy(update={"name": str(folder.adapter)})
        config = config.model_copy(update={"model": section})
        adapter = None if config.method == "full" else folder.adapter
        return Opened(path, RunModel(section, config.data.template, adapter), config, folder)
    adapter = next((each for each in (path, path / "adapter") if (each / CONFIG_NAME).is_file()), None)
    if adapter is not None:
        return Opened(path, RunModel(_section_of(adapter, base), adapter=adapter))
    if path.is_dir() and not (path / MODEL_CONFIG_NAME).is_file():
        kinds = f"a run (metrics.json), an adapter ({CONFIG_NAME}) nor a model ({MODEL_CONFIG_NAME})"
        raise ConfigError(f"{path}: contains neither a finished {kinds[2:]}; give another folder")
    return Opened(path, RunModel(ModelSection(name=base or str(place))))


def _run_of(path: Path) -> RunFolder | None:
    """The finished run in a folder, or whose adapter it is."""
    runs = RunFolder(path), RunFolder(path.absolute().parent)
    found = runs[0] if runs[0].finished or runs[1].adapter != path.absolute() else runs[1]
    return found if found.finished and found.config.is_file() else None


def _on(config: RunConfig, base: str | None) -> RunConfig:
    """The config with a base that the user gave: not quantized, and another one not in the run's revision."""
    if base is None:
        return config
    of_run = ("quantization_config", *([] if base == config.model.name else ["revision"]))
    options = {key: own for key, own in config.model.options.items() if key not in of_run}
    return config.model_copy(update={"model": config.model.model_copy(update={"name": base, "options": options})})


def _as_trained_on(run: RunFolder, model: ModelSection, is_given: bool) -> ModelSection:
    """The model that the run was trained on: of the Hub in that commit. Warns where a folder's files changed since."""
    if packaged_name(model.name) or not run.inputs.is_file():
        return model
    content = str(read_stored(run.inputs)["base"])
    if Path(model.name).expanduser().exists():
        if base_content(model) != content:
            logger.warning("%s: was trained on another model than %s, or on other files of it", run.path, model.name)
        return model
    if is_given or len(content) == OF_FILES or content == str(None):
        return model
    return model.model_copy(update={"options": {"revision": content, **model.options}})


def _section_of(adapter: Path, base: str | None) -> ModelSection:
    """The base of an adapter that lies in no run: ``base``, or the recorded one in the recorded revision."""
    config = PeftConfig.from_pretrained(str(adapter))
    name = base or config.base_model_name_or_path
    if name is None:
        raise ConfigError(f"{adapter / CONFIG_NAME}: records no base model; name it with --base")
    of_base = name == config.base_model_name_or_path  # the revision says nothing of another base
    options = {"revision": config.revision} if of_base and config.revision is not None else {}
    return ModelSection(name=name, options=options)
