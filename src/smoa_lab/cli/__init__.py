"""The ``smoa`` command: its subcommands parse, call the library and print.

It imports smoa only when a subcommand runs: importing smoa registers it with PEFT, which imports torch.
"""
