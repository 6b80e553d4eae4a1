"""Verification: run a package, compare it with its checkpoint, and judge the result by gates."""
