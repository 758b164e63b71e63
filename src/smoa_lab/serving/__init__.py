"""`smoa serve`."""

from smoa_lab.serving.names import check

check()
