"""The ``smoa`` command: one small file per subcommand, each of which parses, calls the library and prints.

A package beside smoa and not inside it: importing anything of smoa registers it with PEFT and so imports torch, for
which ``smoa --help`` must not wait.
"""
