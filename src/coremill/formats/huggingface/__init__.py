"""Hugging Face model directories: read, written and compared with the checkpoint under transformers."""
