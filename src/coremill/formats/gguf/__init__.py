"""GGUF files: read, written and compared with the checkpoint under llama.cpp."""
