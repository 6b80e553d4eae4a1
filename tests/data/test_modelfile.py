"""Modelfiles: Ollama's grammar, its parameters, and each edit by hand that breaks one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coremill.core.errors import ModelfileError
from coremill.data.modelfile import (
    PARAMETERS,
    ROLES,
    Message,
    Modelfile,
    Parameter,
    decode_modelfile,
    parse_modelfile,
    write,
)

FULL = Modelfile(
    model="./answers-q8_0.gguf",
    adapter="./lora.gguf",
    template="{{ range .Messages }}<{{ .Role }}>{{ .Content }}\n{{ end }}",
    parameters=(
        Parameter(name="num_ctx", value=256),
        Parameter(name="temperature", value=0.0),
        Parameter(name="use_mmap", value=True),
        Parameter(name="stop", value="<|end|>"),
        Parameter(name="stop", value='"\n'),
    ),
    system="You are terse.",
    messages=(Message(role="user", content="Hello"), Message(role="assistant", content='"Hi,"\nit said.')),
    licenses=("Apache-2.0",),
)
FULL_TEXT = '''\
FROM ./answers-q8_0.gguf
ADAPTER "./lora.gguf"
TEMPLATE """{{ range .Messages }}<{{ .Role }}>{{ .Content }}
{{ end }}"""
SYSTEM "You are terse."
PARAMETER num_ctx 256
PARAMETER temperature 0.0
PARAMETER use_mmap true
PARAMETER stop "<|end|>"
PARAMETER stop """"
"""
MESSAGE user "Hello"
MESSAGE assistant """"Hi,"
it said."""
LICENSE "Apache-2.0"
'''


def test_what_is_written() -> None:
    assert write(FULL) == str(FULL) == FULL_TEXT
    assert parse_modelfile(FULL_TEXT) == FULL


def parameters_of() -> st.SearchStrategy[list[Parameter]]:
    def values(name: str) -> st.SearchStrategy[Any]:
        kind = PARAMETERS[name]
        if kind.of is bool:
            return st.booleans()
        if kind.of is int:
            return st.integers(max(int(kind.least), -5) if kind.least > -10 else -(2**63), 2**31)
        low, high = max(kind.least, 0.0), min(kind.most, 1e6)
        return st.floats(low, high, exclude_min=kind.above)

    names = st.lists(st.sampled_from([name for name in PARAMETERS if name != "stop"]), unique=True, max_size=4)
    single = names.flatmap(
        lambda chosen: st.tuples(
            *(st.builds(Parameter, name=st.just(name), value=values(name)) for name in chosen)
        ).map(list)
    )
    stops = st.lists(st.sampled_from(["<|end|>", "###", "\n\n", ' "', "é "]), max_size=2)
    return st.builds(
        lambda first, last: [*first, *(Parameter(name="stop", value=stop) for stop in last)], single, stops
    )


TEXTS = st.text(
    st.one_of(st.sampled_from('"# \n\t\r{}'), st.characters(categories=["L", "M", "N", "P", "S"])), max_size=40
)
TEMPLATES = st.sampled_from(["", "{{ .Prompt }}", '\n{{ if .System }}"{{ .System }}"{{ end }} ', FULL.template])
FILES = st.text("abcXYZ019._-/é #", min_size=1, max_size=12)
MODELFILES = st.builds(
    Modelfile,
    model=FILES.map(lambda name: f"./{name}"),
    template=st.none() | TEMPLATES,
    parameters=parameters_of().map(tuple),
    system=st.none() | TEXTS,
    messages=st.lists(st.builds(Message, role=st.sampled_from(ROLES), content=TEXTS), max_size=3).map(tuple),
    licenses=st.lists(TEXTS, max_size=2).map(tuple),
    adapter=st.none() | FILES,
    requires=st.none() | st.just("0.14.0"),
)


@given(MODELFILES)
def test_what_is_written_is_read_back(modelfile: Modelfile) -> None:
    try:
        text = write(modelfile)
    except ModelfileError as failure:
        # Quotes at the end of a line and three of them somewhere: the grammar has no way to write that.
        assume("a quoted text ends where a line ends with its quotes" not in str(failure))
        raise
    assert parse_modelfile(text) == modelfile


@given(TEXTS.filter(lambda text: '"' not in text))
def test_a_text_without_quotes_can_always_be_written(text: str) -> None:
    assert parse_modelfile(write(Modelfile(model="m", system=text))).system == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("SYSTEM plain words  ", "plain words"),
        ("SYSTEM  \t plain", "plain"),
        ('SYSTEM "  kept  "', "  kept  "),
        ('SYSTEM """one\n "two"\nthree"""', 'one\n "two"\nthree'),
        ('SYSTEM "one\ntwo"', "one\ntwo"),
        ('SYSTEM ""', ""),
        ('SYSTEM """"""', ""),
        ("SYSTEM \n", ""),
        ('SYSTEM say "hi"', 'say "hi"'),
        ("SYSTEM # no comment", "# no comment"),
        ('system """a\n"""   \n# a comment', "a\n"),
        ("SyStEm mixed\r\n", "mixed"),
        ("SYSTEM zero\u200dwidth\u00a0dropped", "zerowidthdropped"),
        ('SYSTEM """\n\u00fc\U0001f3b1"""', "\n\u00fc\U0001f3b1"),
        ("SYSTEM it's\ttabbed", "it's\ttabbed"),
        ("\u00a0SYSTEM behind a blank that is no space", "behind a blank that is no space"),
    ],
)
def test_values_are_read_as_ollama_reads_them(text: str, value: str) -> None:
    assert parse_modelfile(f"# first\nFROM m\n\n  {text}").system == value


def test_any_order_and_case() -> None:
    text = "parameter top_k 1\nmessage user hi there\nfrom  model with blanks \n"
    text += "PARAMETER stop ### User:\nLICENSE a\nLicense b"
    assert parse_modelfile(text) == Modelfile(
        model="model with blanks",
        parameters=(Parameter(name="top_k", value=1), Parameter(name="stop", value="### User:")),
        messages=(Message(role="user", content="hi there"),),
        licenses=("a", "b"),
    )


COMMANDS = "FROM, TEMPLATE, SYSTEM, ADAPTER, DRAFT, RENDERER, PARSER, REQUIRES, PARAMETER, MESSAGE, LICENSE"
NAMES = ", ".join(PARAMETERS)
BAD = [
    ("", 1, "it ends without a FROM"),
    ("# FROM m\nSYSTEM a\n", 3, "it ends without a FROM"),
    ("FROM m\nFORM x", 2, f"the command 'FORM' is not one of {COMMANDS}"),
    ("FROM m\n\n1FROM x", 3, f"the command '1FROM' is not one of {COMMANDS}"),
    ("FROM m\n\u3000 x", 2, f"the command '\\u3000' is not one of {COMMANDS}"),
    ("FROM", 1, "FROM without a value"),
    ("FROM\nSYSTEM a", 1, "FROM without a value"),
    ("FROM \nSYSTEM a", 1, "FROM without a value"),
    ("FROM: m", 1, "an unexpected ':' behind FROM"),
    ("FROM m\nFROM n", 2, "a second FROM"),
    ("FROM m\nSYSTEM a\nsystem b", 3, "a second SYSTEM"),
    ('FROM m\nSYSTEM """a\nb\nPARAMETER seed 1\n', 2, "the quotes that SYSTEM opens are not closed"),
    ('FROM m\nPARAMETER stop "<|end|>\n', 2, "the quotes that PARAMETER opens are not closed"),
    ("FROM m\nPARAMETER seed", 2, "PARAMETER seed without a value"),
    ("FROM m\nPARAMETER  seed 1", 2, "two blanks behind PARAMETER: Ollama takes the name to be empty"),
    ("FROM m\nPARAMETER seed=1", 2, "an unexpected '=' behind PARAMETER seed"),
    ("FROM m\nPARAMETER temprature 1", 2, f"the parameter 'temprature' is not one of {NAMES}"),
    ("FROM m\nPARAMETER TEMPERATURE 1", 2, f"the parameter 'TEMPERATURE' is not one of {NAMES}"),
    ("FROM m\nPARAMETER mirostat 1", 2, "the parameter 'mirostat' is deprecated: Ollama ignores it"),
    ("FROM m\nPARAMETER num_ctx 2k", 2, "num_ctx is '2k', not a whole number of at least 1"),
    ("FROM m\nPARAMETER num_ctx 4096 # tokens", 2, "num_ctx is '4096 # tokens', not a whole number of at least 1"),
    ("FROM m\nPARAMETER num_ctx 0", 2, "num_ctx is 0, not a whole number of at least 1"),
    ("FROM m\nPARAMETER top_k 1.5", 2, "top_k is '1.5', not a whole number of at least 0"),
    ("FROM m\nPARAMETER top_p 1.5", 2, "top_p is 1.5, not a number from 0 to 1"),
    ("FROM m\nPARAMETER temperature nan", 2, "temperature is 'nan', not a number of at least 0"),
    ("FROM m\nPARAMETER temperature 0,7", 2, "temperature is '0,7', not a number of at least 0"),
    ("FROM m\nPARAMETER repeat_penalty 0", 2, "repeat_penalty is 0.0, not a number above 0"),
    ("FROM m\nPARAMETER use_mmap yes", 2, "use_mmap is 'yes', not true or false"),
    ("FROM m\nPARAMETER seed 1\nPARAMETER seed 2", 3, "the parameter 'seed' is given twice"),
    ('FROM m\nPARAMETER stop ""', 2, "an empty stop would end every answer before it begins"),
    ("FROM m\nPARAMETER stop <|end|", 2, "the stop '<|end|' is half of a special token"),
    ("FROM m\nPARAMETER stop {{ .X }}", 2, "the stop '{{ .X }}' is a part of a template, which no answer holds"),
    ("FROM m\nMESSAGE bot hi", 2, "the role 'bot' is not one of system, user, assistant"),
    ("FROM m\nMESSAGE User hi", 2, "the role 'User' is not one of system, user, assistant"),
    ("FROM m\nMESSAGE user", 2, "MESSAGE user without a text"),
    ('FROM m\nADAPTER ""', 2, "ADAPTER without a value"),
    ("FROM m\nREQUIRES new", 2, "REQUIRES 'new', which is no version such as 0.14.0"),
    ('FROM m\nTEMPLATE """a\n{{ if .System }}\n"""', 3, "TEMPLATE: {{ if }} without its {{ end }}"),
    ("FROM m\nTEMPLATE {{ .Prompt }", 2, "TEMPLATE: an unexpected '}' in an action"),
]


@pytest.mark.parametrize(("text", "line", "reason"), BAD)
def test_an_edit_that_breaks_it_is_named_with_its_line(text: str, line: int, reason: str) -> None:
    with pytest.raises(ModelfileError) as caught:
        parse_modelfile(text, where="made/Modelfile")
    assert str(caught.value) == (
        f"made/Modelfile, line {line}: {reason}\n"
        "  expected: a Modelfile as https://docs.ollama.com/modelfile describes it\n"
        "  run: python -m coremill.conversion.ollama check made/Modelfile"
    )


def test_files_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03")
    (tmp_path / "b.gguf").write_bytes(b"GG")
    assert parse_modelfile("FROM ./a.gguf", folder=tmp_path).model == "./a.gguf"
    for text, reason in {
        "FROM ./b.gguf": "FROM names b.gguf, which is no GGUF file",
        "FROM ./c.gguf": f"FROM names c.gguf, and there is no {tmp_path / 'c.gguf'}: "
        "Ollama would take it for the name of a model to download",
        "FROM a.gguf\nADAPTER d": f"ADAPTER names d, and there is no {tmp_path / 'd'}",
    }.items():
        with pytest.raises(ModelfileError) as caught:
            parse_modelfile(text, folder=tmp_path)
        assert caught.value.found == f"Modelfile, line {text.count(chr(10)) + 1}: {reason}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding: str) -> None:
    assert decode_modelfile("FROM ü\n".encode(encoding), where="Modelfile") == "FROM ü\n"


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ModelfileError) as caught:
        decode_modelfile(b"FROM m\nSYSTEM \xff", where="Modelfile")
    assert caught.value.found == "Modelfile, line 2: no text: invalid start byte"


@pytest.mark.parametrize(
    ("system", "found"),
    [
        ("a\u200db", "U+200D in 'a\\u200db': Ollama drops what is not printable"),
        (
            '"\n"""\n',
            '\'"\\n"""\\n\' has no place in a Modelfile: a quoted text ends where a line ends with its quotes',
        ),
    ],
)
def test_what_cannot_be_written(system: str, found: str) -> None:
    with pytest.raises(ModelfileError) as caught:
        write(Modelfile(model="m", system=system))
    assert caught.value.found == found


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": ""}, "a FROM that names nothing"),
        (
            {"model": "m", "template": "{{ end }}"},
            "line 1 of the template: an {{ end }} without its if, range or with",
        ),
        (
            {"model": "m", "parameters": (Parameter(name="seed", value=1), Parameter(name="seed", value=1))},
            "the parameter 'seed' is given twice",
        ),
    ],
)
def test_no_such_modelfile_can_be_made(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="^" + reason.replace("{", "\\{")):
        Modelfile(**fields)


def error_of(text: str) -> ModelfileError | None:
    try:
        parse_modelfile(text)
    except ModelfileError as error:
        return error
    return None


PIECES = ["FROM ", "SYSTEM ", "PARAMETER ", "m", '"', '"""', "\n", "#", " ", "stop "]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map(lambda pieces: "FROM a\n" + "".join(pieces)))
def test_any_text_is_a_modelfile_or_an_error_in_one_of_its_lines(text: str) -> None:
    error = error_of(text)
    if error is None:
        assert parse_modelfile(write(parse_modelfile(text))) == parse_modelfile(text)
    else:
        assert any(f", line {line}: " in error.found for line in range(1, text.count("\n") + 2))


def test_every_parameter_has_a_range_that_holds_its_ends() -> None:
    for (name, kind), end in itertools.product(PARAMETERS.items(), ("least", "most")):
        value = getattr(kind, end)
        if abs(value) != float("inf") and not kind.above:
            assert Parameter(name=name, value=kind.of(value)).value == value
