"""A pytest plugin that excludes the collected tests from garbage collection.

coremltools collects garbage in every conversion. With the suite's twenty thousand collected tests, each collection
would take half a second.
"""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
