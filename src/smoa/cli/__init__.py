"""The ``smoa`` command: one small file per subcommand, each of which parses, calls the library and prints."""
