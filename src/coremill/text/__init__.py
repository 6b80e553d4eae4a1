"""Tokenizers and chat templates: those of the student, and those that come with a model."""
