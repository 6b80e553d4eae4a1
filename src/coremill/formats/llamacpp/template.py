"""The prompts that llama.cpp's server makes of conversations, by the chat template of a GGUF file.

The server's template engine is not part of llama.cpp's C API. Therefore the server in `xllamacpp` is run, in a
process of its own. Its route: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md

    python -m coremill.formats.llamacpp.template
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from coremill.core.errors import GgufError
from coremill.text.chat import Message

_TIMEOUT_S = 300


def render_with_llamacpp(path: Path, conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Return the prompt of each conversation, up to where an answer begins.

    Args:
        conversations: lists of messages that end with a user's; the server would continue an answer.

    Raises:
        GgufError: llama.cpp does not load the file, cannot parse its template, or rejects a conversation.
    """
    request = json.dumps({"path": str(path), "conversations": [list(each) for each in conversations]})
    command = [sys.executable, "-m", "coremill.formats.llamacpp.template"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise _failure(path, f"no answer in {_TIMEOUT_S} s") from None
    if done.returncode:
        raise _failure(path, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    prompts: list[str] = json.loads(done.stdout)
    return prompts


def _failure(path: Path, reason: str) -> GgufError:
    return GgufError(
        f"llama.cpp does not apply the chat template of {path}: {reason}",
        expected="a template that llama.cpp's engine can parse",
        run="python -m coremill.conversion.export_gguf --help",
    )


def main() -> int:
    # Imported in this process alone: the module loads the whole server.
    import xllamacpp

    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 64, 1, 0
    params.fit_params = params.warmup = params.ui = False
    params.cache_ram_mib = 0
    params.verbosity = 1  # errors only
    params.api_keys = [secrets.token_hex()]
    answers = os.dup(1)
    os.dup2(2, 1)  # llama.cpp may print to standard output, which would corrupt the answer
    try:
        server = xllamacpp.Server(params)
        prompts = [_post(server.listening_address, params.api_keys[0], each) for each in request["conversations"]]
    except RuntimeError as failure:
        sys.stderr.write(f"{failure}\n")
        sys.stderr.flush()
        os._exit(1)  # without it, the server's threads keep the process alive
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        json.dump(prompts, out)
    os._exit(0)


def _post(address: str, key: str, messages: Sequence[Message]) -> str:
    host = urllib.parse.urlsplit(address)
    # Not urllib, which would use a configured proxy even for this machine.
    connection = http.client.HTTPConnection(str(host.hostname), host.port, timeout=_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/apply-template", json.dumps({"messages": messages}).encode(), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != http.HTTPStatus.OK:
        raise RuntimeError(answer["error"]["message"])
    return str(answer["prompt"])


if __name__ == "__main__":
    sys.exit(main())
