"""The process that :class:`coremill.formats.llamacpp.process.LlamaCpp` runs: llama.cpp with one file.

    python -m coremill.formats.llamacpp.worker

It reads its settings from the first line of its standard input, loads the file and answers one request a line until
the input ends: :mod:`coremill.formats.llamacpp.protocol`. llama.cpp's errors go to standard error.
"""

from __future__ import annotations

import os
import sys
from ctypes import c_int8, c_int32
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from coremill.core.errors import MachineError
from coremill.formats.llamacpp.library import LOG_ERROR, Batch, ContextParams, LogCallback, library
from coremill.formats.llamacpp.protocol import (
    Answer,
    Decode,
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

_F32 = 0
"""`GGML_TYPE_F32`."""


class _Model:
    """A loaded file.

    Raises:
        RuntimeError: llama.cpp does not load it.
    """

    def __init__(self, settings: Settings) -> None:
        self._library = library()
        self._library.llama_backend_init()
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(settings.path, params)
        if not self._model:
            raise RuntimeError("llama.cpp gives no reason")
        self._context = self._library.llama_init_from_model(self._model, self._context_params(settings))
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot create a context of {settings.context} positions")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._library.llama_vocab_n_tokens(self._vocab))

    def _context_params(self, settings: Settings) -> ContextParams:
        """The parameters; all that affect the results are set explicitly."""
        params: ContextParams = self._library.llama_context_default_params()
        params.n_ctx = settings.context
        params.n_batch = params.n_ubatch = settings.batch
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = 0  # off: it rounds more
        params.type_k = params.type_v = _F32
        return params

    def decode(self, request: Decode) -> npt.NDArray[np.float32]:
        """Read tokens and return the logits after each, or after the last one.

        Returns:
            (N or 1, V) float32, in llama.cpp's own memory.

        Raises:
            RuntimeError: llama.cpp does not accept them.
        """
        if request.first:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        count = len(request.ids)
        wanted = [1] * count if request.every else [*[0] * (count - 1), 1]
        batch = Batch(n_tokens=count, token=(c_int32 * count)(*request.ids), logits=(c_int8 * count)(*wanted))
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (sum(wanted), self.vocab_size))

    def vocabulary(self) -> Vocabulary:
        ids, bos = range(self.vocab_size), self._library.llama_vocab_bos(self._vocab)
        template = self._library.llama_model_chat_template(self._model, None)
        return Vocabulary(
            bos_id=None if bos < 0 else bos,
            add_bos=self._library.llama_vocab_get_add_bos(self._vocab),
            end_ids=frozenset(token for token in ids if self._library.llama_vocab_is_eog(self._vocab, token)),
            control_ids=frozenset(
                token for token in ids if self._library.llama_vocab_is_control(self._vocab, token)
            ),
            chat_template=None if template is None else template.decode(),
        )

    def tokenize(self, request: Tokenize) -> list[int]:
        data = request.text.encode()
        most = len(data) + 2  # a token is at least one byte; a beginning and an end token may be added
        tokens = (c_int32 * most)()
        count = self._library.llama_tokenize(
            self._vocab, data, len(data), tokens, most, request.begin, request.allow_special
        )
        if count < 0:
            raise RuntimeError(f"llama_tokenize returned {count} for {len(data)} bytes")
        return tokens[:count]


def _answer(model: _Model, request: Request, out: BinaryIO) -> None:
    try:
        if isinstance(request, Decode):
            logits = model.decode(request)
            _send(out, Logits())
            out.write(memoryview(logits).cast("B"))
        elif isinstance(request, Tokenize):
            _send(out, Tokens(ids=model.tokenize(request)))
        else:
            _send(out, model.vocabulary())
    except RuntimeError as failure:
        _send(out, Refused(reason=str(failure)))
    out.flush()


def _send(out: BinaryIO, answer: Answer) -> None:
    out.write(msgspec.json.encode(answer) + b"\n")
    out.flush()


def _log(level: int, text: bytes, _: object) -> None:
    if level == LOG_ERROR:
        sys.stderr.buffer.write(text)
        sys.stderr.flush()


_LOG = LogCallback(_log)
"""Referenced here for as long as llama.cpp may call it."""


def main() -> int:
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
    # llama.cpp may print to standard output, which would corrupt the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        library().llama_log_set(_LOG, None)
        model = _Model(settings)
    except MachineError as failure:
        _send(out, Unavailable(reason=failure.found))
        return 1
    except RuntimeError as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    _send(out, Loaded(vocab_size=model.vocab_size))
    requests = msgspec.json.Decoder(Request)
    for line in sys.stdin.buffer:
        _answer(model, requests.decode(line), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
