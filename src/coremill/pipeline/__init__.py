"""The stage tables, freshness, locks and atomic stage runs; nox owns environments and order."""
