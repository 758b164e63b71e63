"""The ``smoa`` command: one file per subcommand, which parses, calls the library and prints.

It imports smoa only when a subcommand runs: importing smoa registers it with PEFT, which imports torch.
"""
