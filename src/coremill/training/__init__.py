"""Training: distil a student from a dataset with a teacher, or import an existing model, to a checkpoint."""
