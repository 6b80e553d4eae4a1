"""Imports coremltools without its notices about the libraries of Core ML.

On other systems than macOS it logs eight lines "Failed to load _MLModelProxy: …" at import: Core ML cannot run
there. This package does not need Core ML. Only these lines are dropped, and only during the import.
"""

from __future__ import annotations

import logging
import re

_PROXY_NOTICE = re.compile(r"^Failed to load '?_ML\w+Proxy'?[:.]")


def _is_kept(record: logging.LogRecord) -> bool:
    return not _PROXY_NOTICE.match(record.getMessage())


_logger = logging.getLogger("coremltools")
_logger.addFilter(_is_kept)
try:
    from coremltools.models import MLModel as CoreMLToolsModel
    from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2
finally:
    _logger.removeFilter(_is_kept)

__all__ = ["CoreMLToolsModel", "FeatureTypes_pb2", "MIL_pb2", "Model_pb2"]
