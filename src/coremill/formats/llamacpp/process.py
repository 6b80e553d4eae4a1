"""llama.cpp with a GGUF file: logits, greedy tokens, tokenization.

It runs in a process of its own (:mod:`coremill.formats.llamacpp.worker`), so that an assertion of llama.cpp does
not end this process, its messages are available for the error, and its memory is freed when it is closed.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import operator
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from coremill.core.errors import CheckpointUnreadableError, CoremillError, GgufError, MachineError
from coremill.core.processes import ended_by_signal
from coremill.formats.gguf_file import GgufFile
from coremill.formats.llamacpp.library import EXPECTED_RELEASE, INSTALL, library_path
from coremill.formats.llamacpp.protocol import (
    Answer,
    Decode,
    DescribeVocabulary,
    Loaded,
    Logits,
    Refused,
    Request,
    Settings,
    Tokenize,
    Tokens,
    Unavailable,
    Vocabulary,
)

_BATCH = 512
"""Tokens that are read at once, at most."""
_REMAKE = "python -m coremill.conversion.export_gguf --help"
_EXPECTED = "a complete GGUF file of a model that llama.cpp runs"
_ENDED = "ended while running"

_AnswerT = TypeVar("_AnswerT", Loaded, Logits, Tokens, Vocabulary)


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU. Close it, or use it as a context manager.

    Attention and its cache are in float32.

    Args:
        context: token positions of the cache, for a prompt and all tokens generated after it.
        threads: number of threads that compute.

    Raises:
        GgufError: the file is broken, or llama.cpp does not load it.
        MachineError: llama.cpp is not installed, or is of another build.
        ValueError: `context` is not positive, or larger than the model's.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        threads: int = 1,
    ) -> None:
        self.path = Path(path)
        self.context = context
        library_path()
        # Before llama.cpp loads the file: it accepts some damaged headers, and does not name a truncated tensor.
        self.vocab_size, longest = _sizes(self.path)
        if not 1 <= context <= longest:
            raise ValueError(f"context {context}, the model of {path} has {longest} positions")
        self._worker = _Worker(
            Settings(
                path=os.fsencode(self.path),
                context=context,
                batch=min(_BATCH, context),
                threads=threads,
            ),
            self.path,
        )
        if self._worker.vocab_size != self.vocab_size:
            self.close()
            raise GgufError(
                f"llama.cpp reads {self._worker.vocab_size} tokens from {self.path}, its metadata has "
                f"{self.vocab_size}",
                expected=_EXPECTED,
                run=_REMAKE,
            )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End llama.cpp and free its memory. Further calls do nothing."""
        self._worker.close()

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each of `ids`: (N, V) float32.

        Raises:
            ValueError: `ids` is empty, longer than `context`, or has an id that is not in the vocabulary.
            GgufError: llama.cpp ended, or computes NaN or infinity.
        """
        ids = self._checked(ids, new_tokens=0)
        out = np.empty((len(ids), self.vocab_size), np.float32)
        with self._worker.lock:
            for start in range(0, len(ids), _BATCH):
                part = ids[start : start + _BATCH]
                self._worker.decode(part, out[start : start + len(part)], first=start == 0)
        if not (is_finite := np.isfinite(out).all(-1)).all():
            raise self._not_finite(int(is_finite.argmin()) + 1)
        return out

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]) -> list[int]:
        """Continue `ids` with the likeliest token each time, until one of `stop_ids` or `max_new_tokens`.

        The end tokens of the file have no effect unless they are in `stop_ids`.

        Returns:
            The new tokens, including the stop id if there is one.

        Raises:
            ValueError: `ids` is empty or has an id that is not in the vocabulary, `max_new_tokens` is below 1, or
                both together exceed `context`.
            GgufError: llama.cpp ended, or computes NaN or infinity.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        ids = self._checked(ids, new_tokens=max_new_tokens)
        generated: list[int] = []
        with self._worker.lock:
            for row in self._greedy(ids, generated):
                generated.append(int(row.argmax()))
                if generated[-1] in stop_ids or len(generated) == max_new_tokens:
                    break
        return generated

    def _greedy(self, ids: Sequence[int], generated: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """The logits, (V,), after `ids`, then after each token that the caller appends to `generated`."""
        row = np.empty((1, self.vocab_size), np.float32)
        for start in range(0, len(ids), _BATCH):
            self._worker.decode(ids[start : start + _BATCH], row, first=start == 0)
        while True:
            if not np.isfinite(row).all():
                raise self._not_finite(len(ids) + len(generated))
            yield row[0]
            self._worker.decode(generated[-1:], row, first=False)

    def vocabulary(self) -> Vocabulary:
        """Return llama.cpp's view of the file's tokens.

        Raises:
            GgufError: llama.cpp ended.
        """
        return self._worker.query(DescribeVocabulary(), Vocabulary)

    def tokenize(self, text: str, *, allow_special: bool, begin: bool = False) -> list[int]:
        """Return the ids of `text` from llama.cpp's tokenizer of the file.

        Args:
            begin: add the tokens that begin every text.
            allow_special: recognise special tokens in the text.

        Raises:
            ValueError: `text` has a lone surrogate.
            GgufError: llama.cpp ended, or does not tokenize it.
        """
        text.encode()  # raises for a lone surrogate
        return self._worker.query(Tokenize(text=text, begin=begin, allow_special=allow_special), Tokens).ids

    def _checked(self, ids: Sequence[int], *, new_tokens: int) -> list[int]:
        ids = [operator.index(token) for token in ids]
        if not ids:
            raise ValueError("there are no tokens")
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token id {outside[0]} is not in a vocabulary of {self.vocab_size}")
        if len(ids) + new_tokens > self.context:
            raise ValueError(
                f"{len(ids)} tokens and {new_tokens} new ones, the context has {self.context} positions"
            )
        return ids

    def _not_finite(self, count: int) -> GgufError:
        return GgufError(
            f"llama.cpp computes NaN or infinity after {count} tokens of {self.path}",
            expected=_EXPECTED,
            run=_REMAKE,
        )


def _sizes(path: Path) -> tuple[int, int]:
    """(V, the longest context) of the file at `path`."""
    try:
        metadata = GgufFile(path).metadata
    except CheckpointUnreadableError as failure:
        raise GgufError(failure.found, expected=_EXPECTED, run=_REMAKE) from failure
    longest = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(longest, int) or not isinstance(tokens, list):
        missing = "tokenizer" if isinstance(longest, int) else "context_length"
        raise GgufError(f"{path} has no {missing} in its metadata", expected=_EXPECTED, run=_REMAKE)
    return len(tokens), longest


# --- its process ------------------------------------------------------------------------------------


class _Worker:
    """llama.cpp in a process of its own, which reads requests from its standard input.

    The process ends when this object is closed or collected, at exit, and when this process dies, because that ends
    its standard input.
    """

    def __init__(self, settings: Settings, path: Path) -> None:
        self._path = path
        held = contextlib.ExitStack()
        self._close = weakref.finalize(self, held.close)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the rest; a full pipe would block
        held.callback(self._log.close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coremill.formats.llamacpp.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Without the first, idle threads spin and slow other processes down. Without the second, an assertion
            # of llama.cpp starts a debugger.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1"},
        )
        held.callback(_end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.lock = threading.RLock()
        """Held while a sequence is read in parts."""
        with self._whole_answer():
            answer = self._exchange(settings, failure="does not load")
        if isinstance(answer, Unavailable):
            self.close()
            raise MachineError(answer.reason, expected=EXPECTED_RELEASE, run=INSTALL)
        self.vocab_size = self._expected(answer, Loaded).vocab_size

    def decode(self, ids: Sequence[int], out: npt.NDArray[np.float32], *, first: bool) -> None:
        """Read `ids`; write the logits after the last of them into `out`, (len(out), V) float32, contiguous."""
        with self._whole_answer():
            answer = self._exchange(Decode(ids=list(ids), first=first, every=len(out) == len(ids)))
            if isinstance(answer, Logits):
                self._read_into(out.data.cast("B"))
        self._expected(answer, Logits)

    def query(self, request: Request, expected: type[_AnswerT]) -> _AnswerT:
        """Return the answer to a request.

        Raises:
            GgufError: the process ended, or llama.cpp returned an error.
            OutOfMemoryError, CrashError: a signal ended the process, which left no log.
        """
        with self._whole_answer():
            answer = self._exchange(request)
        return self._expected(answer, expected)

    @contextlib.contextmanager
    def _whole_answer(self) -> Iterator[None]:
        """Close the process if an answer is not read to its end: the rest would be taken for the next answer."""
        with self.lock:
            if not self._close.alive:
                raise ValueError(f"llama.cpp with {self._path} is closed")
            try:
                yield
            except BaseException:
                self.close()
                raise

    def _exchange(self, request: Request | Settings, *, failure: str = _ENDED) -> Answer:
        with contextlib.suppress(BrokenPipeError):  # the process ended; its log has the reason
            self._stdin.write(msgspec.json.encode(request) + b"\n")
            self._stdin.flush()
        if not (line := self._stdout.readline()):
            raise self._ended(failure)
        answer: Answer = msgspec.json.decode(line, type=Answer)
        return answer

    def _read_into(self, out: memoryview) -> None:
        while out:
            if not (count := self._stdout.readinto(out)):  # type: ignore[attr-defined]  # a BufferedReader
                raise self._ended(_ENDED)
            out = out[count:]

    def _expected(self, answer: Answer, expected: type[_AnswerT]) -> _AnswerT:
        if isinstance(answer, Refused):
            raise GgufError(f"llama.cpp rejected {self._path}: {answer.reason}", expected=_EXPECTED, run=_REMAKE)
        assert isinstance(answer, expected)
        return answer

    def _ended(self, failure: str) -> CoremillError:
        """The error for a process that ended, with the first line of its log, which has only errors."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = self._process.returncode
        if not lines and code is not None and code < 0:
            return ended_by_signal(f"llama.cpp with {self._path}", -code)
        reason = lines[0] if lines else f"exit code {code}"
        return GgufError(f"llama.cpp {failure} {self._path}: {reason}", expected=_EXPECTED, run=_REMAKE)

    def close(self) -> None:
        self._close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process; it has no file open for writing."""
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # unsent input
        process.communicate()
