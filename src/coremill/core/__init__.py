"""Types and file formats that all packages share; imports neither torch nor coremltools, on Python 3.10 to 3.13."""
