"""The `coremill` command, its subcommands, and how a subcommand restarts in an environment that can run it."""
