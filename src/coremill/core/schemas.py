"""`python -m coremill.core.schemas DIR`: write the JSON Schema of every file format into DIR."""

from __future__ import annotations

import sys
from pathlib import Path

from coremill.core.answer_key import AnswerKey
from coremill.core.config import DistilledRun, ImportedRun
from coremill.core.contract import Contract
from coremill.core.diagnostics import ConversionDiagnostics, ConversionFailure
from coremill.core.documents import Document, json_schemas
from coremill.core.manifest import StageManifest
from coremill.core.matrix import AgreementMatrix
from coremill.core.parity import GgufParity, HuggingFaceParity, SourceParity
from coremill.core.publish import write_atomic
from coremill.core.reports import RunSummary, VerificationReport

FORMATS: list[type[Document]] = [
    DistilledRun,
    ImportedRun,
    StageManifest,
    Contract,
    ConversionDiagnostics,
    ConversionFailure,
    VerificationReport,
    RunSummary,
    AgreementMatrix,
    AnswerKey,
    HuggingFaceParity,
    SourceParity,
    GgufParity,
]


def main(argv: list[str] | None = None) -> int:
    folder = Path((sys.argv[1:] if argv is None else argv)[0])
    for name, schema in json_schemas(FORMATS).items():
        write_atomic(folder / name, schema)
    return 0


if __name__ == "__main__":
    sys.exit(main())
