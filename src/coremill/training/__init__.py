"""Distillation: from a dataset with its teacher to a checkpoint."""
