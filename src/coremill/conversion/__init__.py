"""From a checkpoint to a verified package: export, conversion and verification, and what the three share."""
