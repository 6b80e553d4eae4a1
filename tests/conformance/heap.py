"""A pytest plugin: what was collected stays out of the garbage collector's way.

coremltools collects garbage in every conversion, and the suite's twenty thousand collected tests are a heap that
takes half a second to go through each time.
"""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
