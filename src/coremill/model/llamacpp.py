"""llama.cpp itself, asked what a GGUF file computes: log probabilities, greedy tokens, its own tokenizer.

The `xllamacpp` package carries llama.cpp's server. It runs in a process of its own
(:mod:`coremill.model.llamacpp_server`), so that an assertion of
llama.cpp ends that process and not this one, its messages are there for the error, and closing it frees its memory.
The routes and their fields: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md.

Legend: V vocabulary.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import urllib.parse
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from coremill.core.errors import CheckpointUnreadableError, GgufError
from coremill.model.gguf_file import GgufFile

CacheType = Literal["f32", "f16"]

LOG_PROB_FLOOR = -87.0
"""Below it a probability is no normal float32, which llama.cpp computes it in: what it says there has few digits,
or is the lowest float32 of all."""

_TIMEOUT_S = 3600
_FORCED = 1000.0
"""A bias that no logit outweighs."""
_REMAKE = "python -m coremill.conversion.export_gguf --help"
_EXPECTED = "a whole GGUF file of a model that llama.cpp runs"
_ERROR_LINE = re.compile(r"^[\d.]+ E (.+)$", re.MULTILINE)
"""A line of llama.cpp's log: time, level, text."""


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU; a context manager, or to be closed.

    Settings that change what is computed are explicit; attention and cache are in float32 unless asked otherwise.

    Args:
        context: token positions of the cache: a prompt and all that is generated behind it. llama.cpp has no more
            than the model was trained for.
        threads: of the arithmetic.
        flash_attention: attention in llama.cpp's fused form, which rounds more.
        cache_dtype: what keys and values are kept as.

    Raises:
        GgufError: `path` is no whole GGUF file, or llama.cpp does not load it; says why.
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
        # First, because it names the tensor that is cut and llama.cpp reads some damaged headers as shorter ones.
        self.vocab_size, longest = _facts(self.path)
        if not 1 <= context <= longest:
            raise ValueError(f"context {context}, the model of {path} has {longest} positions")
        settings = {
            "path": str(self.path),
            "context": context,
            "threads": threads,
            "flash_attention": flash_attention,
            "cache_dtype": cache_dtype,
            "key": secrets.token_hex(),
        }
        self._server = _ServerProcess(settings, self.path)
        try:
            self._printable = self.tokenize("a", allow_special=False)[-1]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End llama.cpp and free its memory; a second time does nothing."""
        self._server.close()

    def log_probs(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Log probabilities, in nats, of each token to come after `ids`: (V,) float32, in the order of ids.

        They are those of the model, before anything of sampling. None is below :data:`LOG_PROB_FLOOR`.

        Raises:
            ValueError: `ids` is empty, has an id that the vocabulary lacks, or has `context` tokens or more:
                llama.cpp keeps a position for the token that it says.
            GgufError: llama.cpp ended, did not say all of them, or computes NaN.
        """
        self._check(ids, room=1)
        answer = self._server.post(
            "/completion",
            {
                **_greedy(ids, 1),
                "n_probs": self.vocab_size,
                "post_sampling_probs": False,
                # What is said after a byte that is no whole character is held back, its probabilities with it.
                # The bias is on what is sampled alone: a character that prints.
                "logit_bias": [[self._printable, _FORCED]],
            },
            _Completion,
        )
        said = answer.completion_probabilities[0].top_logprobs if answer.completion_probabilities else ()
        places = np.fromiter((each.id for each in said), np.int64, len(said))
        if len(said) != self.vocab_size or len(np.unique(places)) != self.vocab_size:
            raise GgufError(
                f"llama.cpp gave log probabilities of {len(np.unique(places))} tokens of {self.path}",
                expected=f"all {self.vocab_size} of its vocabulary",
                run=_REMAKE,
            )
        if any(each.logprob is None for each in said):
            raise GgufError(
                f"llama.cpp computes NaN after {len(ids)} tokens of {self.path}", expected=_EXPECTED, run=_REMAKE
            )
        out = np.empty(self.vocab_size)
        out[places] = [each.logprob for each in said]
        # llama.cpp sums the probabilities in float32, one by one: of 50,000, all are off by as much as 2e-4 alike.
        out -= np.log(np.exp(out).sum())
        log_probs: np.ndarray[Any, Any] = np.maximum(out, LOG_PROB_FLOOR).astype(np.float32)
        return log_probs

    def rows(self, ids: Sequence[int], positions: Sequence[int]) -> np.ndarray[Any, Any]:
        """`log_probs` after each of `positions`, places in `ids`: (len(positions), V) float32.

        The cache keeps what was read: positions one after another cost a token each. Raises as `log_probs`, and a
        ValueError for a position that `ids` lacks.
        """
        if outside := [place for place in positions if not 0 <= place < len(ids)]:
            raise ValueError(f"position {outside[0]} of {len(ids)} tokens")
        out = np.empty((len(positions), self.vocab_size), np.float32)
        for number, place in enumerate(positions):
            out[number] = self.log_probs(ids[: place + 1])
        return out

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]) -> list[int]:
        """Continue `ids` with the likeliest token each time, until one of `stop_ids` or `max_new_tokens`.

        The end tokens that the file names do not end it unless they are in `stop_ids`.

        Returns:
            The new tokens alone, the stop id included where one ended them.

        Raises:
            ValueError: `ids` is empty or has an id that the vocabulary lacks, `max_new_tokens` is below 1, or the
                two are more than `context`.
            GgufError: llama.cpp ended.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        self._check(ids, room=max_new_tokens)
        said: list[int] = []
        while (room := max_new_tokens - len(said)) > 0:
            # llama.cpp stops at an end token of the file's; another request goes on behind it.
            answer = self._server.post("/completion", _greedy([*ids, *said], room), _Completion)
            for token in answer.tokens:
                said.append(token)
                if token in stop_ids:
                    return said
            if not answer.tokens:
                raise GgufError(
                    f"llama.cpp said nothing after {len(ids) + len(said)} tokens of {self.path}",
                    expected=f"{room} tokens more",
                    run=_REMAKE,
                )
        return said

    def tokenize(self, text: str, *, allow_special: bool) -> list[int]:
        """The ids of `text` by llama.cpp's tokenizer of the file; nothing is put before or behind it.

        Args:
            allow_special: whether a special token that the text spells is that token.

        Raises:
            GgufError: llama.cpp ended, or does not tokenize it.
        """
        body = {"content": text, "add_special": False, "parse_special": allow_special}
        return self._server.post("/tokenize", body, _Tokens).tokens

    def _check(self, ids: Sequence[int], *, room: int) -> None:
        if not ids:
            raise ValueError("there are no tokens")
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token id {outside[0]} is not in a vocabulary of {self.vocab_size}")
        if len(ids) + room > self.context:
            raise ValueError(f"{len(ids)} tokens and {room} to come, the context has {self.context} positions")


def _greedy(ids: Sequence[int], n_predict: int) -> dict[str, Any]:
    """A request to go on after `ids`: the likeliest token, no penalty, the keys and values of before kept."""
    return {
        "prompt": list(ids),
        "n_predict": n_predict,
        "temperature": 0,
        "samplers": ["temperature"],
        "cache_prompt": True,
        "return_tokens": True,
    }


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


# --- what the server says ---------------------------------------------------------------------------
# Other keys are llama.cpp's to add; these alone are read.


class _Probability(msgspec.Struct):
    id: int
    logprob: float | None
    """None for what JSON has no number for."""


class _Position(msgspec.Struct):
    top_logprobs: list[_Probability]


class _Completion(msgspec.Struct):
    tokens: list[int]
    completion_probabilities: list[_Position] = []


class _Tokens(msgspec.Struct):
    tokens: list[int]


_Answer = TypeVar("_Answer", _Completion, _Tokens)


# --- its process ------------------------------------------------------------------------------------


class _ServerProcess:
    """llama.cpp's server in a process of its own, on a port of this machine that wants a key.

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
            [sys.executable, "-m", "coremill.model.llamacpp_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Threads that wait for work otherwise spin, which starves whoever shares the processor.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )
        held.callback(_end, self._process)
        address = _start(self._process, settings)
        if not address:
            failure = self._failure("does not load")
            self.close()
            raise failure
        host = urllib.parse.urlsplit(address)
        self._address = (str(host.hostname), host.port)
        self._headers = {"Authorization": f"Bearer {settings['key']}", "Content-Type": "application/json"}

    def post(self, route: str, body: dict[str, Any], kind: type[_Answer]) -> _Answer:
        """Ask a route of the server.

        Raises:
            GgufError: the server ended, refused, or answered something else.
        """
        if not self._close.alive:
            raise ValueError(f"llama.cpp with {self._path} is closed")
        # Not urllib, which sends what is for this machine to a proxy where one is configured.
        connection = http.client.HTTPConnection(*self._address, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", route, json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as failure:
            raise self._failure("ended while it ran") from failure
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise GgufError(
                f"llama.cpp refused {route} for {self._path}: {data.decode(errors='replace')}",
                expected=_EXPECTED,
                run=_REMAKE,
            )
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as failure:
            raise GgufError(
                f"llama.cpp answered {route} for {self._path} with something else: {failure}",
                expected="the answers of the release of xllamacpp in requirements/train.txt",
                run="pip install -r requirements/train.txt",
            ) from failure

    def _failure(self, what: str) -> GgufError:
        """What to say of a process that is no longer there: the first error of its log, or the end of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        errors = _ERROR_LINE.findall(log)
        last = log.strip().splitlines()[-1:] or [f"exit code {self._process.returncode}"]
        return GgufError(f"llama.cpp {what} {self._path}: {(errors or last)[0]}", expected=_EXPECTED, run=_REMAKE)

    def close(self) -> None:
        self._close()


def _start(process: subprocess.Popen[bytes], settings: dict[str, Any]) -> str:
    """Give the server its settings; its address once the file is loaded, or nothing where it ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it ended at once, and its log says why
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
    return process.stdout.readline().decode().strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """At once: it holds no file open for writing."""
    process.kill()
    process.communicate()
