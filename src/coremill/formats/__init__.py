"""Model formats other than Core ML: readers, writers and comparisons with the checkpoint."""
