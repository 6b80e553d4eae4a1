"""Ollama: the Modelfile beside a GGUF file, and one answer from an Ollama server where there is one."""
