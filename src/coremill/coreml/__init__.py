"""Core ML packages: the exported graph, its conversion, and the package on disk."""
