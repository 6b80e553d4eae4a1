"""The inputs of models and their expected answers: datasets, teachers, corpora and prompts. Imports no torch."""
