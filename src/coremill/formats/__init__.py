"""Model formats other than Core ML's: each is read, written and compared with the checkpoint."""
