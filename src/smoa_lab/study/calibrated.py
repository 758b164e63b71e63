"""What `python studies/calibration.py levels` found."""

LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.00553, 0.00287, 0.00216, 0.00173, 0.00161, 0.00148, 0.00139),
    2: (0.027, 0.0155, 0.0116, 0.00979, 0.00857, 0.00772, 0.00736),
    3: (0.0432, 0.0247, 0.0196, 0.0164, 0.0142, 0.0128, 0.0113),
    4: (0.0541, 0.0293, 0.0217, 0.0178, 0.0156, 0.0142, 0.0129),
    5: (0.0554, 0.0332, 0.0247, 0.0207, 0.0175, 0.0157, 0.0145),
    6: (0.0622, 0.0365, 0.027, 0.0224, 0.0189, 0.0169, 0.0155),
}
"""The level of a look, by the number of entries, for 2, 3, 4 and more planned rounds."""
NOISE: dict[str, tuple[float, float]] = {
    "scored": (0.033, 0.78),
    "loss": (0.0053, 0.034),
}
"""Standard deviations of a seed's mean, and of a row's difference between two entries: of losses in nats per token, of
right answers in those of the base model's."""
