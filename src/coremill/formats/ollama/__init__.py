"""Ollama: the Modelfile of a GGUF file, and an answer from Ollama where it is installed."""
