"""The commands of `coremill mil`: one module for each command, with a function `main(argv)`.

Only these modules of the package print and import rich. The result of a command is a value that a function returns;
other functions render it.
"""
