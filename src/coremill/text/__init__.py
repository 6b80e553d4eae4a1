"""Tokenizers and chat templates, of the student and of imported models."""
