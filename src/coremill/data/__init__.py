"""Datasets, tokenizer and teachers: everything that a student learns from. No torch here."""
