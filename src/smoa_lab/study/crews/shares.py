"""A worker's share of a cluster: as many cores as let all workers fit, or one GPU each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smoa.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """What a machine of a cluster offers; of a share, what one worker takes."""

    cores: int
    gpus: int = 0

    def places(self, share: Machine) -> int:
        """How many workers with this share fit."""
        by_cores = self.cores // share.cores
        return min(by_cores, self.gpus // share.gpus) if share.gpus else by_cores


def equal_share(machines: Sequence[Machine], workers: int, on_gpus: bool) -> Machine:
    """The largest number of cores, with one GPU if ``on_gpus``, of which ``workers`` find place on the machines.

    Raises:
        ConfigError: there are fewer cores or GPUs than workers.
    """
    gpus = int(on_gpus)
    for cores in range(max((machine.cores for machine in machines), default=0), 0, -1):
        share = Machine(cores, gpus)
        if sum(machine.places(share) for machine in machines) >= workers:
            return share
    most = sum(machine.places(Machine(1, gpus)) for machine in machines)
    raise ConfigError(
        f"--workers {workers}: each takes {'a GPU and a core' if on_gpus else 'a core'} at least, "
        f"and there is room for {most}; give at most {most}"
    )
