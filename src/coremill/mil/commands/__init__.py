"""The commands behind `coremill mil`: one module a command, each with `main(argv)`.

They alone of this room print, and import rich. What a command finds is a value that a function returns; rendering
is apart from it.
"""
