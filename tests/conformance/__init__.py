"""Runs coremltools' operation tests with coremill.mil instead of Core ML; see `plugin` and `__main__`."""
