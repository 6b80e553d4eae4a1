"""Types and formats that every room shares; imports neither torch nor coremltools, on Python 3.10 to 3.13."""
