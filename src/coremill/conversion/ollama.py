"""Ollama: the Modelfile beside a GGUF file, its check, and one answer where Ollama is installed.

python -m coremill.conversion.ollama check Modelfile
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coremill.core.command import command_parser, exit_on_error
from coremill.core.documents import Record
from coremill.core.errors import GgufError, ModelfileError, TokenizerError
from coremill.core.gates import PlatformReason
from coremill.core.layout import modelfile
from coremill.core.publish import write_atomic
from coremill.data.modelfile import (
    Modelfile,
    Parameter,
    ParameterValue,
    decode_modelfile,
    parse_modelfile,
    write,
)

if TYPE_CHECKING:  # heavy, and not needed to check a file
    from coremill.data.text_tokenizer import TextTokenizer

log = logging.getLogger(__name__)

COMMAND = "ollama"
_ASK_S = 15
"""For a server to say that it is there, in seconds."""
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
    platform_reason: PlatformReason = PlatformReason.NEEDS_OLLAMA


OllamaRun = OllamaAnswered | OllamaNotRun


def write_modelfile(
    folder: Path,
    gguf: str,
    tokenizer: TextTokenizer,
    *,
    context: int,
    parameters: Mapping[str, ParameterValue] | None = None,
) -> Modelfile:
    """Write the Modelfile of the GGUF file `gguf` into `folder`, where that file lies.

    The template is the tokenizer's own chat format; a model without one gets its prompt as it is. The default
    system prompt becomes SYSTEM, and what an answer does not go beyond becomes stops.

    Args:
        gguf: the file's name in `folder`.
        context: `num_ctx`, in tokens.
        parameters: such as `temperature`; by the names of :data:`coremill.data.modelfile.PARAMETERS`.

    Raises:
        TokenizerError: a chat template that writes none of the known formats.
        ModelfileError: a parameter that Ollama does not take, or no such GGUF file.
        OutputError: it cannot be written.
    """
    from coremill.data.chat_formats import FORMATS, find_chat_format

    found = find_chat_format(tokenizer)
    if found is None and tokenizer.chat_template is not None:
        raise TokenizerError(
            "the chat template writes conversations in a format that has no template for Ollama here",
            expected=f"the format of {', '.join(each.name for each in FORMATS)}",
        )
    values = [("num_ctx", context), *(parameters or {}).items()]
    path = modelfile(folder)
    try:
        made = Modelfile(
            model=f"./{gguf}",
            template="{{ .Prompt }}" if found is None else found.go_template(begin=not tokenizer.add_bos),
            parameters=tuple(
                Parameter(name=name, value=value)
                for name, value in [*values, *(("stop", stop) for stop in (found.stops if found else ()))]
            ),
            system=None if found is None else found.default_system,
        )
    except ValueError as failure:
        raise ModelfileError(f"{path}: {failure}", expected="what Ollama takes") from failure
    text = write(made)
    parse_modelfile(text, where=str(path), folder=folder)
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

    Args:
        folder: holds the Modelfile and the GGUF file.
        name: of the model; a part of the temporary name that it gets.

    Raises:
        ModelfileError: the Modelfile is wrong, or Ollama refuses it.
        GgufError: Ollama does not run the model.
    """
    path = modelfile(folder)
    check_modelfile(path)
    if shutil.which(COMMAND) is None:
        return OllamaNotRun(reason=f"there is no `{COMMAND}` on PATH")
    if (silent := _silence()) is not None:
        return OllamaNotRun(reason=silent)
    temporary = f"coremill-{name.lower()}-{uuid.uuid4().hex[:8]}"
    try:
        made = _ollama(["create", temporary, "-f", path.name], folder=folder)
        if made.returncode != 0:
            raise ModelfileError(
                f"{path}: ollama create failed: {_last_line(made.stderr)}",
                expected="a Modelfile and a GGUF file that Ollama takes",
                run=f"ollama create {name} -f {path}",
            )
        answered = _ollama(["run", temporary, question])
        if answered.returncode != 0:
            raise GgufError(
                f"{path}: ollama run failed: {_last_line(answered.stderr)}",
                expected="a GGUF file that Ollama runs",
                run=f"ollama create {name} -f {path} && ollama run {name}",
            )
    except subprocess.TimeoutExpired as failure:
        raise GgufError(
            f"{path}: ollama {failure.cmd[1]} took more than {failure.timeout:g} s",
            expected="an answer",
            run="ollama ps",
        ) from failure
    finally:
        if _ollama(["rm", temporary]).returncode != 0:
            log.warning("the model %s could not be removed from Ollama", temporary)
    version = _ollama(["--version"]).stdout.strip()
    return OllamaAnswered(version=version, question=question, answer=answered.stdout.strip("\n"))


def _silence() -> str | None:
    """Why Ollama's server does not answer; None if it does."""
    try:
        listed = _ollama(["list"], limit_s=_ASK_S)
    except subprocess.TimeoutExpired:
        return f"Ollama's server did not answer in {_ASK_S} s"
    return None if listed.returncode == 0 else f"Ollama's server does not answer: {_last_line(listed.stderr)}"


def _ollama(
    arguments: Sequence[str], *, folder: Path | None = None, limit_s: int = _WORK_S
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,  # `ollama run` would read on from ours
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=limit_s,
        check=False,
    )


def _last_line(text: str) -> str:
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
    parser = command_parser("python -m coremill.conversion.ollama", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="read a Modelfile as Ollama does")
    check.add_argument("modelfile", type=Path, metavar="MODELFILE")
    return parser


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
