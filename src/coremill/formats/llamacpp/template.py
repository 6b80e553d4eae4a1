"""The prompts that llama.cpp's server makes of conversations, by the chat template of a GGUF file.

Its template engine is its own, and no part of its C API: it is asked in a process of its own, as the server that
`xllamacpp` carries is used. https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md has the route.

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
from typing import Any

from coremill.core.errors import GgufError

_TIMEOUT_S = 300


def render_with_llamacpp(path: Path, conversations: Sequence[Sequence[Any]]) -> list[str]:
    """The prompt of each conversation, up to where an answer begins.

    Args:
        conversations: lists of messages, the last of them a user's: an answer at the end would be gone on with.

    Raises:
        GgufError: llama.cpp does not load the file, does not read its template, or refuses a conversation.
    """
    asked = json.dumps({"path": str(path), "conversations": [list(each) for each in conversations]})
    command = [sys.executable, "-m", "coremill.formats.llamacpp.template"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise _refusal(path, f"it did not answer in {_TIMEOUT_S} s") from None
    if done.returncode:
        raise _refusal(path, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    prompts: list[str] = json.loads(done.stdout)
    return prompts


def _refusal(path: Path, reason: str) -> GgufError:
    return GgufError(
        f"llama.cpp does not apply the chat template of {path}: {reason}",
        expected="a template that its own engine reads",
        run="python -m coremill.conversion.export_gguf --help",
    )


def main() -> int:
    # Only this process carries the server.
    import xllamacpp

    asked = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = asked["path"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 64, 1, 0
    params.fit_params = params.warmup = params.ui = False
    params.cache_ram_mib = 0
    params.verbosity = 1  # errors alone
    params.api_keys = [secrets.token_hex()]
    answers = os.dup(1)
    os.dup2(2, 1)  # what llama.cpp might print is no answer
    try:
        server = xllamacpp.Server(params)
        prompts = [_ask(server.listening_address, params.api_keys[0], each) for each in asked["conversations"]]
    except RuntimeError as failure:
        sys.stderr.write(f"{failure}\n")
        sys.stderr.flush()
        os._exit(1)  # the server's threads do not end by themselves
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        json.dump(prompts, out)
    os._exit(0)


def _ask(address: str, key: str, messages: Sequence[Any]) -> str:
    host = urllib.parse.urlsplit(address)
    # Not urllib, which sends what is for this machine to a proxy where one is configured.
    connection = http.client.HTTPConnection(str(host.hostname), host.port, timeout=_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/apply-template", json.dumps({"messages": messages}).encode(), headers)
    response = connection.getresponse()
    said = json.loads(response.read())
    if response.status != http.HTTPStatus.OK:
        raise RuntimeError(said["error"]["message"])
    return str(said["prompt"])


if __name__ == "__main__":
    sys.exit(main())
