"""coremltools, imported without its notices about Core ML's own libraries.

Off macOS it logs eight lines "Failed to load _MLModelProxy: …" on import. They say that Core ML cannot run here,
which is why this package exists. Those lines alone are dropped, and only while coremltools is imported.
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
