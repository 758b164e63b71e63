"""Searches the learning rate of a single run, as a study does for each of its entries."""

from __future__ import annotations

from smoa.atomic import check_place
from smoa.errors import ConfigError
from smoa_lab.config.run_config import RunConfig
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.entry import Entry
from smoa_lab.study.plan import Tuned
from smoa_lab.study.study_file import Study, Tuning

START = 3e-3
"""Where the search begins if the config has no learning rate."""
OWN = ("learning_rate", "output_dir", "seed")
"""What the search sets itself."""


def tune_run(config: RunConfig, max_runs: int = 6) -> Tuned:
    """Train ``config`` at half decades and then quarter decades, and score each run on the validation part.

    The runs are kept beside the run's folder, in ``OUTPUT_DIR-tuning``; the search resumes there.

    Raises:
        ConfigError: there is no validation part, or the folder holds runs of another config.
        DataError: model or data cannot be loaded.
    """
    shared = config.model_dump(mode="json", include={"model", "data", "task"})
    training = {key: value for key, value in config.training.items() if key not in OWN}
    start = float(config.training.get("learning_rate", START))
    study = Study(
        folder=config.folder.with_name(f"{config.folder.name}-tuning"),
        shared={**shared, "training": training},
        entries={"run": Entry(method=config.method, adapter=config.adapter, learning_rate=start)},
        tuning=Tuning(seed=int(config.training.get("seed", 42)), max_runs=max_runs, refine=True),
    )
    check_place(study.folder / "untouched.json")
    comparison = Comparison(study)
    if not comparison.bench.records.validation:
        raise ConfigError(
            "data: leaves no validation questions, by which rates are compared; set data.validation_examples, or a "
            "larger data.validation_part"
        )
    return comparison.tune("run")
