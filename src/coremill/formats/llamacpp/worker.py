"""The process that :class:`coremill.formats.llamacpp.process.LlamaCpp` talks to: llama.cpp with one file.

    python -m coremill.formats.llamacpp.worker

It reads its settings, a JSON object, from a line of its standard input, loads the file and answers requests, a line
each, until the input ends. An answer is a line of JSON, behind which the bytes of the logits come. llama.cpp's
errors are on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from ctypes import c_int8, c_int32
from typing import Any, BinaryIO

import numpy as np

from coremill.core.errors import MachineError
from coremill.formats.llamacpp.library import LOG_ERROR, Batch, LogCallback, library

_CACHE = {"f32": 0, "f16": 1}
"""`enum ggml_type`."""


class _Model:
    """A file that is loaded."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._library = library()
        self._library.llama_backend_init()
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        model = self._library.llama_model_load_from_file(os.fsencode(settings["path"]), params)
        if not model:
            raise RuntimeError("llama.cpp gives no reason")
        self._context = self._library.llama_init_from_model(model, self._context_params(settings))
        if not self._context:
            raise RuntimeError(f"there is no context of {settings['context']} positions")
        self._model = model
        self._vocab = self._library.llama_model_get_vocab(model)
        self.vocab_size = int(self._library.llama_vocab_n_tokens(self._vocab))

    def _context_params(self, settings: dict[str, Any]) -> Any:
        """All that changes what is computed, and nothing that is done for speed alone."""
        params = self._library.llama_context_default_params()
        params.n_ctx = settings["context"]
        params.n_batch = params.n_ubatch = settings["batch"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.flash_attn_type = int(settings["flash_attention"])
        params.type_k = params.type_v = _CACHE[settings["cache_dtype"]]
        return params

    def decode(self, ids: list[int], *, first: bool, every: bool) -> np.ndarray[Any, Any]:
        """Read `ids` after what was read, or as the first of all: the logits after each, or after the last.

        Returns:
            (N or 1, V) float32, llama.cpp's own memory.

        Raises:
            RuntimeError: llama.cpp does not read them.
        """
        if first:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        count = len(ids)
        wanted = [1] * count if every else [*[0] * (count - 1), 1]
        batch = Batch(n_tokens=count, token=(c_int32 * count)(*ids), logits=(c_int8 * count)(*wanted))
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gives {status}")
        logits = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (sum(wanted), self.vocab_size))

    def vocabulary(self) -> dict[str, Any]:
        """The fields of :class:`coremill.formats.llamacpp.process.Vocabulary`."""
        ids, bos = range(self.vocab_size), self._library.llama_vocab_bos(self._vocab)
        template = self._library.llama_model_chat_template(self._model, None)
        return {
            "bos_id": None if bos < 0 else bos,
            "add_bos": self._library.llama_vocab_get_add_bos(self._vocab),
            "end_ids": [token for token in ids if self._library.llama_vocab_is_eog(self._vocab, token)],
            "control_ids": [token for token in ids if self._library.llama_vocab_is_control(self._vocab, token)],
            "chat_template": None if template is None else template.decode(),
        }

    def tokenize(self, text: str, *, begin: bool, allow_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 2  # no token is less than a byte; the beginning is one, and the end may be
        tokens = (c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), tokens, room, begin, allow_special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize gives {count} for {len(data)} bytes")
        return tokens[:count]


def _answer(model: _Model, request: dict[str, Any], out: BinaryIO) -> None:
    try:
        if "text" in request:
            _say(out, {"tokens": model.tokenize(**request)})
        elif not request:
            _say(out, model.vocabulary())
        else:
            logits = model.decode(request["ids"], first=request["first"], every=request["every"])
            _say(out, {"rows": len(logits)})
            out.write(memoryview(logits).cast("B"))
    except RuntimeError as failure:
        _say(out, {"error": str(failure)})
    out.flush()


def _say(out: BinaryIO, what: dict[str, Any]) -> None:
    out.write(json.dumps(what).encode() + b"\n")
    out.flush()


def _log(level: int, text: bytes, _: object) -> None:
    if level == LOG_ERROR:
        sys.stderr.buffer.write(text)
        sys.stderr.flush()


_LOG = LogCallback(_log)
"""Kept as long as llama.cpp may call it."""


def main() -> int:
    settings = json.loads(sys.stdin.buffer.readline())
    # What llama.cpp might print is no answer.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        library().llama_log_set(_LOG, None)
        model = _Model(settings)
    except MachineError as failure:
        _say(out, {"machine": failure.found})
        return 1
    except RuntimeError as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    _say(out, {"vocab_size": model.vocab_size})
    for line in sys.stdin.buffer:
        _answer(model, json.loads(line), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
