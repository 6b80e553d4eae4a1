"""The summary of a run: printed in a terminal, and written as summary.json and STATUS.md."""
