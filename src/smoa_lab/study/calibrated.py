"""What `python studies/calibration.py levels` found."""

LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.0384, 0.0226, 0.0124, 0.0103, 0.00853, 0.00772, 0.00703),
    2: (0.043, 0.0231, 0.0167, 0.0137, 0.0119, 0.0108, 0.01),
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
