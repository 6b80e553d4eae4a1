"""The `coremill` command: the table of its subcommands, and their restart in an environment that can run them."""
