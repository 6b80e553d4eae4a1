"""Ollama: the Modelfile beside a GGUF file, its check, and one answer where Ollama is installed.

python -m coremill.formats.ollama.server check Modelfile
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coremill.core.command import command_parser, exit_on_error
from coremill.core.documents import Record
from coremill.core.errors import GgufError, ModelfileError, TokenizerError
from coremill.core.layout import modelfile
from coremill.core.publish import write_atomic
from coremill.formats.ollama.modelfile import (
    Modelfile,
    Parameter,
    decode_modelfile,
    parse_modelfile,
    write,
)

if TYPE_CHECKING:  # heavy, and not needed to check a file
    from coremill.text.model_tokenizer import TextTokenizer

log = logging.getLogger(__name__)

COMMAND = "ollama"
_ASK_S = 15
"""For it to say that it is there, or to forget a model, in seconds."""
_WORK_S = 600
"""For it to take a model in, or to answer, in seconds."""


class OllamaAnswered(Record):
    """What a model said when Ollama ran it."""

    version: str
    """What `ollama --version` says."""
    question: str
    answer: str


class OllamaNotRun(Record):
    """Why Ollama was not run."""

    reason: str


OllamaRun = OllamaAnswered | OllamaNotRun


def write_modelfile(folder: Path, gguf: str, tokenizer: TextTokenizer, *, context: int) -> Modelfile:
    """Write the Modelfile of the GGUF file `gguf` into `folder`, where that file lies.

    The template is the tokenizer's own chat format; a model without one gets its prompt as it is. The default
    system prompt becomes SYSTEM, and what an answer does not go beyond becomes stops. First, however,
    the text is read as Ollama reads it, and its template renders conversations beside the tokenizer's own.

    Args:
        gguf: the file's name in `folder`.
        context: `num_ctx`, in tokens.

    Raises:
        TokenizerError: a chat template that writes none of the known formats.
        ModelfileError: a `context` that Ollama does not take, no such GGUF file, or a template that writes one
            character otherwise than the tokenizer's own.
        OutputError: it cannot be written.
    """
    from coremill.formats.ollama.chat_formats import FORMATS, find_chat_format, go_fault

    found = find_chat_format(tokenizer)
    if found is None and tokenizer.chat_template is not None:
        raise TokenizerError(
            "the chat template writes conversations in a format that has no template for Ollama here",
            expected=f"the format of {', '.join(each.name for each in FORMATS)}",
        )
    stops = () if found is None else found.stops
    path = modelfile(folder)
    try:
        made = Modelfile(
            model=f"./{gguf}",
            template="{{ .Prompt }}" if found is None else found.go_template(begin=not tokenizer.add_bos),
            parameters=(
                Parameter(name="num_ctx", value=context),
                *(Parameter(name="stop", value=stop) for stop in stops),
            ),
            system=None if found is None else found.default_system,
        )
    except ValueError as failure:
        raise ModelfileError(f"{path}: {failure}", expected="what Ollama takes") from failure
    text = write(made)
    read = parse_modelfile(text, where=str(path), folder=folder)
    if found is not None and read.template is not None:
        known = replace(found, default_system=read.system)
        if fault := go_fault(read.template, known, tokenizer):
            raise ModelfileError(
                f"{path}: TEMPLATE: {fault}", expected="the texts of the model's own chat template"
            )
    write_atomic(path, text.encode("utf-8"))
    return made


def check_modelfile(path: Path) -> Modelfile:
    """Read the Modelfile at `path`, and look for the files that it names.

    Raises:
        ModelfileError: it is unreadable, or Ollama would not take it as it is meant; names the line and the reason.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as failure:
        raise ModelfileError(f"cannot read {path}: {failure.strerror}", expected="a Modelfile") from failure
    return parse_modelfile(decode_modelfile(data, where=str(path)), where=str(path), folder=path.parent)


def run_with_ollama(folder: Path, name: str, question: str) -> OllamaRun:
    """Have Ollama take in the model in `folder`, answer `question`, and forget the model again.

    Where the command is missing or does not start, or no server answers it, Ollama is not run, and the reason is
    told. What fails after that is an error. The answer is sampled as the Modelfile says: `ollama run` has no option
    for a temperature.

    Args:
        folder: holds the Modelfile and the GGUF file.
        name: of the model; a part of the temporary name that it gets.

    Raises:
        ModelfileError: the Modelfile is wrong, or Ollama refuses it.
        GgufError: Ollama does not run the model, or prints no answer: nothing, no UTF-8, or control sequences.
    """
    path = modelfile(folder)
    check_modelfile(path)
    version = _version()
    if isinstance(version, OllamaNotRun):
        return version
    temporary = f"coremill-{name.lower()}-{uuid.uuid4().hex[:8]}"
    made = _ollama(["create", temporary, "-f", path.name], limit_s=_WORK_S, folder=folder)
    if made.fault is not None:
        raise ModelfileError(
            f"{path}: ollama create failed: {made.fault}",
            expected="a Modelfile and a GGUF file that Ollama takes",
            run=f"ollama create {name} -f {path}",
        )
    try:
        answered = _ollama(["run", temporary, question], limit_s=_WORK_S)
    finally:
        removed = _ollama(["rm", temporary], limit_s=_ASK_S)
        if removed.fault is not None:
            log.warning("the model %s could not be removed from Ollama: %s", temporary, removed.fault)
    again = f"ollama create {name} -f {path} && ollama run {name}"
    if answered.fault is not None:
        raise GgufError(
            f"{path}: ollama run failed: {answered.fault}", expected="a GGUF file that Ollama runs", run=again
        )
    answer = _plain_text(answered.stdout)
    if answer is None:
        raise GgufError(
            f"{path}: ollama run printed {_shown(answered.stdout)}",
            expected="an answer: text in UTF-8 without control sequences",
            run=again,
        )
    return OllamaAnswered(version=version, question=question, answer=answer)


def _version() -> str | OllamaNotRun:
    """The version of the Ollama whose server answers."""
    if shutil.which(COMMAND) is None:
        return OllamaNotRun(reason=f"there is no `{COMMAND}` on PATH")
    asked = _ollama(["--version"], limit_s=_ASK_S)
    if asked.fault is not None:
        return OllamaNotRun(reason=f"`{COMMAND} --version` failed: {asked.fault}")
    version = _plain_text(asked.stdout)
    if version is None:
        return OllamaNotRun(reason=f"`{COMMAND} --version` printed {_shown(asked.stdout)}, which is no version")
    listed = _ollama(["list"], limit_s=_ASK_S)
    if listed.fault is not None:
        return OllamaNotRun(reason=f"Ollama's server does not answer: {listed.fault}")
    return version


@dataclass(frozen=True)
class _Run:
    """What came of a command."""

    stdout: bytes = b""
    fault: str | None = None
    """Why it did not succeed."""


def _ollama(arguments: Sequence[str], *, limit_s: float, folder: Path | None = None) -> _Run:
    try:
        done = subprocess.run(
            [COMMAND, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,  # `ollama run` puts what it reads there before the question
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
    """What was printed, without the line ends around it; None if that is no text, or has control sequences."""
    try:
        text = printed.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError:
        return None
    plain = all(letter in "\n\t" or unicodedata.category(letter) != "Cc" for letter in text)
    return text if plain and text.strip() else None


def _shown(printed: bytes) -> str:
    return repr(printed if len(printed) <= 60 else printed[:57] + b"...") if printed else "nothing"


_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control sequences (ECMA-48, 5.4) and characters: Ollama draws a spinner where its messages go."""


def _last_line(printed: bytes) -> str:
    text = _CONTROL.sub("", printed.decode("utf-8", errors="replace").replace("\r", "\n"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"


def main(argv: list[str] | None = None) -> int:
    """The command: checks a Modelfile, and prints what it holds."""
    args = _parser().parse_args(argv)
    found = check_modelfile(args.modelfile)
    parts = [name for name in ("template", "system", "adapter") if getattr(found, name) is not None]
    counts = f"{len(found.parameters)} parameters, {len(found.messages)} messages"
    sys.stdout.write(f"{args.modelfile}: FROM {found.model}, {', '.join([*parts, counts])}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("ollama", __doc__, example="check Modelfile")
    commands = parser.add_subparsers(dest="command", required=True, help="what to do")
    check = commands.add_parser("check", help="read a Modelfile as Ollama does")
    check.add_argument("modelfile", type=Path, metavar="MODELFILE")
    return parser


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
