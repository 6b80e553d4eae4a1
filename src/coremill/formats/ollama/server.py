"""Ollama: create a model from a directory of GGUF files, and ask it one question.

The model gets a temporary name, and is removed again. Without Ollama the command fails: nothing was checked.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import subprocess
import sys
import unicodedata
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coremill.core.command import command_parser, exit_on_error
from coremill.core.documents import Record
from coremill.core.errors import GgufError, MachineError, ModelfileError
from coremill.core.layout import modelfile

log = logging.getLogger(__name__)

COMMAND = "ollama"
_QUERY_S = 15
"""Time limit for Ollama to report its version or to remove a model, in seconds."""
_WORK_S = 600
"""Time limit for Ollama to create a model or to answer, in seconds."""


class OllamaAnswered(Record):
    """The answer of a model that Ollama ran."""

    version: str
    """The output of `ollama --version`."""
    question: str
    answer: str


class OllamaNotRun(Record):
    """Why Ollama was not run."""

    reason: str


OllamaRun = OllamaAnswered | OllamaNotRun


def run_with_ollama(directory: Path, question: str) -> OllamaRun:
    """Have Ollama create the model in `directory`, answer `question`, and remove the model again.

    If the command is missing or does not start, or no server answers it, Ollama is not run, and the reason is
    returned. Any later failure is an error. The answer is sampled as the Modelfile specifies: `ollama run` has no
    option for a temperature.

    Args:
        directory: holds the Modelfile and the GGUF file.

    Raises:
        ModelfileError: there is no Modelfile, or Ollama rejects it.
        GgufError: Ollama does not run the model, or prints no answer: nothing, invalid UTF-8, or control sequences.
    """
    path = modelfile(directory)
    if not path.is_file():
        raise ModelfileError(
            f"there is no {path}",
            expected="a directory that the GGUF export wrote, for a model of a known chat format",
        )
    version = _version()
    if isinstance(version, OllamaNotRun):
        return version
    temporary = f"coremill-{uuid.uuid4().hex}"
    create = f"ollama create NAME -f {path}"
    created = _ollama(["create", temporary, "-f", path.name], limit_s=_WORK_S, directory=directory)
    if created.fault is not None:
        raise ModelfileError(
            f"{path}: ollama create failed: {created.fault}",
            expected="a Modelfile and a GGUF file that Ollama accepts",
            run=create,
        )
    try:
        answered = _ollama(["run", temporary, question], limit_s=_WORK_S)
    finally:
        removed = _ollama(["rm", temporary], limit_s=_QUERY_S)
        if removed.fault is not None:
            log.warning("the model %s could not be removed from Ollama: %s", temporary, removed.fault)
    if answered.fault is not None:
        raise GgufError(
            f"{path}: ollama run failed: {answered.fault}",
            expected="a GGUF file that Ollama runs",
            run=f"{create} && ollama run NAME",
        )
    answer = _plain_text(answered.stdout)
    if answer is None:
        raise GgufError(
            f"{path}: ollama run printed {_shown(answered.stdout)}",
            expected="an answer: text in UTF-8 without control sequences",
            run=f"{create} && ollama run NAME",
        )
    return OllamaAnswered(version=version, question=question, answer=answer)


def _version() -> str | OllamaNotRun:
    """The version of the Ollama whose server answers."""
    if shutil.which(COMMAND) is None:
        return OllamaNotRun(reason=f"there is no `{COMMAND}` on PATH")
    reported = _ollama(["--version"], limit_s=_QUERY_S)
    if reported.fault is not None:
        return OllamaNotRun(reason=f"`{COMMAND} --version` failed: {reported.fault}")
    version = _plain_text(reported.stdout)
    if version is None:
        return OllamaNotRun(
            reason=f"`{COMMAND} --version` printed {_shown(reported.stdout)}, which is not a version"
        )
    listed = _ollama(["list"], limit_s=_QUERY_S)
    if listed.fault is not None:
        return OllamaNotRun(reason=f"Ollama's server does not answer: {listed.fault}")
    return version


@dataclass(frozen=True)
class _Run:
    """The result of a command."""

    stdout: bytes = b""
    fault: str | None = None
    """Why it failed, or None."""


def _ollama(arguments: Sequence[str], *, limit_s: float, directory: Path | None = None) -> _Run:
    try:
        done = subprocess.run(
            [COMMAND, *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,  # `ollama run` prepends its standard input to the question
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except OSError as failure:
        return _Run(fault=f"it cannot be started: {failure.strerror}")
    except subprocess.TimeoutExpired:
        return _Run(fault=f"it took more than {limit_s:g} s")
    if done.returncode != 0:
        return _Run(stdout=done.stdout, fault=_last_line(done.stderr))
    return _Run(stdout=done.stdout)


def _plain_text(printed: bytes) -> str | None:
    """The output without the line ends around it; None if it is blank, not UTF-8, or has control sequences."""
    try:
        text = printed.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError:
        return None
    plain = all(letter in "\n\t" or unicodedata.category(letter) != "Cc" for letter in text)
    return text if plain and text.strip() else None


def _shown(printed: bytes) -> str:
    return repr(printed if len(printed) <= 60 else printed[:57] + b"...") if printed else "nothing"


_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control sequences (ECMA-48, 5.4) and characters: Ollama draws a spinner among its messages."""


def _last_line(printed: bytes) -> str:
    text = _CONTROL.sub("", printed.decode("utf-8", errors="replace").replace("\r", "\n"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed no message"


def main(argv: list[str] | None = None) -> int:
    """The command: prints the model's answer.

    Raises:
        MachineError: Ollama is not installed, or its server does not answer.
        ModelfileError, GgufError: as :func:`run_with_ollama`.
    """
    options = _parser().parse_args(argv)
    found = run_with_ollama(options.directory, options.question)
    if isinstance(found, OllamaNotRun):
        raise MachineError(
            f"not_run: {found.reason}",
            expected="Ollama (https://ollama.com) on PATH, and its server running",
        )
    log.info("Ollama %s answers %r", found.version, found.question)
    sys.stdout.write(f"{found.answer}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("ollama", __doc__, example='build/magic-8-ball/gguf --question "Will it rain?"')
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="holds the Modelfile and the GGUF file")
    parser.add_argument("--question", default="Will it rain tomorrow?", help="the question (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
