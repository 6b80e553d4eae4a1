"""The stage table, freshness, locking and atomic publishing; nox owns environments and order."""
