"""coremltools' own operation tests, with coremill.mil in Core ML's place; see `plugin` and `__main__`."""
