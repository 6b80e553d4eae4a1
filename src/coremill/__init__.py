"""coremill: from a small language model to a verified on-device package."""

__version__ = "0.1.0"
