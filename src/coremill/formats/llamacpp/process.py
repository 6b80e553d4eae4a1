"""llama.cpp itself, asked what a GGUF file computes: logits, greedy tokens, its own tokenizer.

It runs in a process of its own (:mod:`coremill.formats.llamacpp.worker`), so that an assertion of llama.cpp ends
that process and not this one, its messages are there for the error, and closing it frees its memory.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coremill.core.errors import CheckpointUnreadableError, GgufError, MachineError
from coremill.formats.gguf_file import GgufFile
from coremill.formats.llamacpp.library import library_path

CacheType = Literal["f32", "f16"]

_BATCH = 512
"""Tokens that are read at once, at most."""
_REMAKE = "python -m coremill.conversion.export_gguf --help"
_EXPECTED = "a whole GGUF file of a model that llama.cpp runs"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What llama.cpp makes of a file's tokens; it adds to what the file says what it knows some of them by."""

    bos_id: int | None
    add_bos: bool
    """Whether a text begins with `bos_id`."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    control_ids: frozenset[int]
    """Tokens that a text spells only where that is allowed."""
    chat_template: str | None


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU; a context manager, or to be closed.

    Settings that change what is computed are explicit; attention and cache are in float32 unless asked otherwise.

    Args:
        context: token positions of the cache: a prompt and all that is generated behind it.
        threads: of the arithmetic.
        flash_attention: attention in llama.cpp's fused form, which rounds more.
        cache_dtype: what keys and values are kept as.

    Raises:
        GgufError: the file is broken, or llama.cpp does not load it.
        MachineError: there is no llama.cpp, or another build of it.
        ValueError: `context` is not positive, or beyond the model's.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        threads: int = 1,
        flash_attention: bool = False,
        cache_dtype: CacheType = "f32",
    ) -> None:
        self.path = Path(path)
        self.context = context
        library_path()
        # First, because it names the tensor that is cut and llama.cpp reads some damaged headers as shorter ones.
        self.vocab_size, longest = _facts(self.path)
        if not 1 <= context <= longest:
            raise ValueError(f"context {context}, the model of {path} has {longest} positions")
        self._worker = _Worker(
            {
                "path": str(self.path),
                "context": context,
                "batch": min(_BATCH, context),
                "threads": threads,
                "flash_attention": flash_attention,
                "cache_dtype": cache_dtype,
            },
            self.path,
        )
        if self._worker.vocab_size != self.vocab_size:
            self.close()
            raise GgufError(
                f"llama.cpp has {self._worker.vocab_size} tokens of {self.path}, its metadata {self.vocab_size}",
                expected=_EXPECTED,
                run=_REMAKE,
            )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End llama.cpp and free its memory; a second time does nothing."""
        self._worker.close()

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """The logits after each of `ids`: (N, V) float32.

        Raises:
            ValueError: `ids` is empty, longer than `context`, or has an id that the vocabulary lacks.
            GgufError: llama.cpp ended, or computes NaN or infinity.
        """
        ids = self._checked(ids, room=0)
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

        The end tokens that the file names do not end it unless they are in `stop_ids`.

        Returns:
            The new tokens alone, the stop id included where one ended them.

        Raises:
            ValueError: `ids` is empty or has an id that the vocabulary lacks, `max_new_tokens` is below 1, or the
                two are more than `context`.
            GgufError: llama.cpp ended, or computes NaN or infinity.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        ids = self._checked(ids, room=max_new_tokens)
        said: list[int] = []
        with self._worker.lock:
            for row in self._greedy(ids, said):
                said.append(int(row.argmax()))
                if said[-1] in stop_ids or len(said) == max_new_tokens:
                    break
        return said

    def _greedy(self, ids: Sequence[int], said: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """The logits, (V,), after `ids`, then after each token that was added to `said` meanwhile."""
        row = np.empty((1, self.vocab_size), np.float32)
        for start in range(0, len(ids), _BATCH):
            self._worker.decode(ids[start : start + _BATCH], row, first=start == 0)
        while True:
            if not np.isfinite(row).all():
                raise self._not_finite(len(ids) + len(said))
            yield row[0]
            self._worker.decode(said[-1:], row, first=False)

    def vocabulary(self) -> Vocabulary:
        """What llama.cpp makes of the file's tokens.

        Raises:
            GgufError: llama.cpp ended.
        """
        said = self._worker.ask({})
        return Vocabulary(
            bos_id=said["bos_id"],
            add_bos=said["add_bos"],
            end_ids=frozenset(said["end_ids"]),
            control_ids=frozenset(said["control_ids"]),
            chat_template=said["chat_template"],
        )

    def tokenize(self, text: str, *, allow_special: bool, begin: bool = False) -> list[int]:
        """The ids of `text` by llama.cpp's tokenizer of the file.

        Args:
            begin: whether that goes before it which begins every text.
            allow_special: whether a special token that the text spells is that token.

        Raises:
            ValueError: `text` is no Unicode text.
            GgufError: llama.cpp ended, or does not tokenize it.
        """
        text.encode()  # a lone surrogate is none
        tokens: list[int] = self._worker.ask({"text": text, "begin": begin, "allow_special": allow_special})[
            "tokens"
        ]
        return tokens

    def _checked(self, ids: Sequence[int], *, room: int) -> list[int]:
        ids = [operator.index(token) for token in ids]
        if not ids:
            raise ValueError("there are no tokens")
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token id {outside[0]} is not in a vocabulary of {self.vocab_size}")
        if len(ids) + room > self.context:
            raise ValueError(f"{len(ids)} tokens and {room} to come, the context has {self.context} positions")
        return ids

    def _not_finite(self, count: int) -> GgufError:
        return GgufError(
            f"llama.cpp computes NaN or infinity after {count} tokens of {self.path}",
            expected=_EXPECTED,
            run=_REMAKE,
        )


def _facts(path: Path) -> tuple[int, int]:
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
    """llama.cpp in a process of its own, which is asked by its standard input.

    It ends when it is closed, when this object is collected, at exit, and when this process dies: its standard
    input ends then.
    """

    def __init__(self, settings: dict[str, Any], path: Path) -> None:
        self._path = path
        held = contextlib.ExitStack()
        self._close = weakref.finalize(self, held.close)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the rest; a pipe would block when full
        held.callback(self._log.close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coremill.formats.llamacpp.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Threads that wait for work otherwise spin, which starves whoever shares the processor; an assertion of
            # llama.cpp otherwise starts a debugger.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1"},
        )
        held.callback(_end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.lock = threading.RLock()
        """Held by who asks: what is read in parts is one sequence."""
        said = self.ask(settings, otherwise="does not load")
        if "machine" in said:
            self.close()
            raise MachineError(
                str(said["machine"]),
                expected="the release of xllamacpp in requirements/train.txt",
                run="pip install -r requirements/train.txt",
            )
        self.vocab_size = int(said["vocab_size"])

    def decode(self, ids: Sequence[int], out: np.ndarray[Any, Any], *, first: bool) -> None:
        """Read `ids`; the logits after the last of them go into `out`, (len(out), V) float32, contiguous."""
        with self._whole_answer():
            said = self._said({"ids": list(ids), "first": first, "every": len(out) == len(ids)})
            if "rows" in said:
                self._read_into(memoryview(out).cast("B"))
        self._check_taken(said)

    def ask(self, request: dict[str, Any], *, otherwise: str = "ended while it ran") -> dict[str, Any]:
        """The answer to a request.

        Raises:
            GgufError: the process ended, which is said by `otherwise`, or refused.
        """
        with self._whole_answer():
            said = self._said(request, otherwise=otherwise)
        self._check_taken(said)
        return said

    @contextlib.contextmanager
    def _whole_answer(self) -> Iterator[None]:
        """Where an answer was not read to its end nothing is asked again: what is left of it would be the next."""
        with self.lock:
            if not self._close.alive:
                raise ValueError(f"llama.cpp with {self._path} is closed")
            try:
                yield
            except BaseException:
                self.close()
                raise

    def _said(self, request: dict[str, Any], *, otherwise: str = "ended while it ran") -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it ended, and its log says why
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        if not (line := self._stdout.readline()):
            raise self._failure(otherwise)
        said: dict[str, Any] = json.loads(line)
        return said

    def _read_into(self, room: memoryview) -> None:
        while room:
            if not (count := self._stdout.readinto(room)):  # type: ignore[attr-defined]  # a BufferedReader
                raise self._failure("ended while it ran")
            room = room[count:]

    def _check_taken(self, said: dict[str, Any]) -> None:
        if "error" in said:
            raise GgufError(f"llama.cpp refused {self._path}: {said['error']}", expected=_EXPECTED, run=_REMAKE)

    def _failure(self, what: str) -> GgufError:
        """What to say of a process that is no longer there: the first line of its log, which has errors alone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        reason = lines[0] if lines else f"exit code {self._process.returncode}"
        return GgufError(f"llama.cpp {what} {self._path}: {reason}", expected=_EXPECTED, run=_REMAKE)

    def close(self) -> None:
        self._close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """At once: it holds no file open for writing."""
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # what it was never told
        process.communicate()
