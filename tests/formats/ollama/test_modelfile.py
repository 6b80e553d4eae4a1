"""Modelfiles: Ollama's grammar, its parameters, and each edit by hand that breaks one."""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coremill.core.errors import ModelfileError
from coremill.formats.ollama.modelfile import (
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
        ('SYSTEM """\n\u00fc\U0001f3b1"""', "\n\u00fc\U0001f3b1"),
        ("SYSTEM it's\ttabbed", "it's\ttabbed"),
        ('SYSTEM "one" two"', 'one" two'),
        ('SYSTEM "a\n\n \t\nb"\t ', "a\n\n \t\nb"),
        ('SYSTEM """\n"""\r\n', "\n"),
        ('SYSTEM """a" \n"""', 'a" \n'),
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
NO_64 = "which does not fit into 64 bits"
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
    ("FROM m\nPARAMETER stop end|>", 2, "the stop 'end|>' is half of a special token"),
    ("FROM m\nPARAMETER stop <|end", 2, "the stop '<|end' is half of a special token"),
    ("FROM m\nPARAMETER stop <|a|>b<|c|", 2, "the stop '<|a|>b<|c|' is half of a special token"),
    ("FROM m\nPARAMETER num_ctx 9223372036854775808", 2, f"num_ctx is 9223372036854775808, {NO_64}"),
    ("FROM m\nPARAMETER seed -9223372036854775809", 2, f"seed is -9223372036854775809, {NO_64}"),
    ("FROM m\nPARAMETER num_ctx 99999999999999999999", 2, f"num_ctx is '99999999999999999999', {NO_64}"),
    ("FROM m\nPARAMETER num_ctx " + "9" * 5000, 2, f"num_ctx is '{'9' * 57}...', {NO_64}"),
    ("FROM m\nPARAMETER temperature 1e39", 2, "temperature is 1e+39, which does not fit into 32 bits"),
    ("FROM m\nPARAMETER temperature 1e400", 2, "temperature is inf, not a number of at least 0"),
    ("FROM m\nSYSTEM zero\u200dwidth", 2, "U+200D in SYSTEM, which Ollama drops"),
    ('FROM m\nSYSTEM """a\nb\x00c"""', 3, "U+0000 in SYSTEM, which Ollama drops"),
    ('FROM m\nSYSTEM "a"\u200b\nLICENSE "b"', 2, "U+200B in SYSTEM, which Ollama drops"),
    ('FROM m\nMESSAGE user \u00a0"a"', 2, "U+00A0 in MESSAGE, which Ollama drops"),
    ("FROM m\n\u00a0SYSTEM a", 2, f"the command '\\xa0SYSTEM' is not one of {COMMANDS}"),
    ("FROM m\nREQUIRES \u0661.2", 2, "REQUIRES '\u0661.2', which is no version such as 0.14.0"),
    ('FROM m\nTEMPLATE """\n\n{{ template "a" }}"""', 4, "TEMPLATE: the template 'a' is not defined"),
    (
        "FROM m\nTEMPLATE " + "{{ if .System }}" * 3000 + "{{ end }}" * 3000,
        2,
        "TEMPLATE: more than 100 blocks and parentheses inside of one another",
    ),
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
        "  run: python -m coremill.formats.ollama.server check made/Modelfile"
    )


@pytest.mark.parametrize("stop", ["<|im_start|>user", "user<|end|>", "<|a|><|b|>", "x |> y", "a <| b", "<", "|"])
def test_a_stop_may_hold_text_beside_a_whole_special_token(stop: str) -> None:
    assert parse_modelfile(f"FROM m\nPARAMETER stop {stop}").parameters == (Parameter(name="stop", value=stop),)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2**63 - 1), ("seed", -(2**63)), ("temperature", 3.4e38), ("temperature", 1e-60), ("num_ctx", 1)],
)
def test_a_number_may_be_as_large_as_ollama_has_bits(name: str, value: float) -> None:
    text = f"FROM m\nPARAMETER {name} {value}"
    assert parse_modelfile(text).parameters == (Parameter(name=name, value=value),)
    assert parse_modelfile(text.replace(f"{value}", f"+{value}" if value > 0 else f"{value}")).parameters


def test_a_number_that_python_does_not_write_is_no_parameter() -> None:
    with pytest.raises(
        ValueError, match=r"^num_ctx is a number of more than 60 digits, which does not fit into 64"
    ):
        Parameter(name="num_ctx", value=10**5000)


def gguf(*values: bytes, version: int = 3, tensors: Sequence[bytes] = ()) -> bytes:
    """A file without weights."""
    header = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(values))
    return b"".join([header, *values, *tensors])


def pair(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


WORD = struct.pack("<Q", 3) + b"abc"
WHOLE_GGUF = gguf(
    *(pair(f"n{kind}", kind, bytes(size)) for kind, size in ((0, 1), (3, 2), (6, 4), (7, 1), (12, 8))),
    pair("text", 8, WORD),
    pair("words", 9, struct.pack("<IQ", 8, 2) + WORD + WORD),
    pair("numbers", 9, struct.pack("<IQ", 5, 3) + bytes(12)),
    tensors=[WORD + struct.pack("<IQQIQ", 2, 4, 4, 0, 0), WORD + struct.pack("<IQIQ", 1, 4, 0, 64)],
)
CUT = "is truncated: its {} bytes end within its header"
GGUF_FAULTS = {
    "empty.gguf": (b"", "is empty"),
    "other.GGUF": (b"PK\x03\x04" * 9, "is no GGUF file: it begins with b'PK\\x03\\x04'"),
    "short": (b"GGU", "is no GGUF file: it begins with b'GGU'"),
    "magic": (b"GGUF", CUT.format(4)),
    "cut.gguf": (gguf()[:23], CUT.format(23)),
    "new.gguf": (gguf(version=4), "is of GGUF version 4"),
    "big-endian.gguf": (gguf(version=3 << 24), "is of GGUF version 50331648"),
    "type.gguf": (gguf(pair("a", 13, bytes(8))), "is damaged: it has metadata of type 13"),
    "nested.gguf": (gguf(pair("a", 9, struct.pack("<IQ", 9, 1))), "is damaged: it has metadata of type 9"),
    "long text.gguf": (gguf(pair("a", 8, struct.pack("<Q", 2**64 - 1))), CUT.format(45)),
    "many words.gguf": (gguf(pair("a", 9, struct.pack("<IQ", 8, 2**64 - 1) + WORD)), CUT.format(60)),
}


def test_every_cut_through_a_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for size in range(4, len(WHOLE_GGUF)):
        path.write_bytes(WHOLE_GGUF[:size])
        assert refusal("FROM m.gguf", tmp_path) == f"line 1: FROM names 'm.gguf', which {CUT.format(size)}"
    path.write_bytes(WHOLE_GGUF)
    parse_modelfile("FROM m.gguf", folder=tmp_path)


@pytest.mark.parametrize("command", ["FROM", "ADAPTER", "DRAFT"])
@pytest.mark.parametrize("name", GGUF_FAULTS)
def test_a_file_that_is_no_gguf_is_refused(name: str, command: str, tmp_path: Path) -> None:
    data, reason = GGUF_FAULTS[name]
    (tmp_path / "m.gguf").write_bytes(WHOLE_GGUF)
    (tmp_path / name).write_bytes(data)
    text = f"FROM ./{name}" if command == "FROM" else f"FROM m.gguf\n{command} ./{name}"
    assert refusal(text, tmp_path) == f"line {text.count(chr(10)) + 1}: {command} names './{name}', which {reason}"


def refusal(text: str, folder: Path) -> str:
    with pytest.raises(ModelfileError) as caught:
        parse_modelfile(text, folder=folder)
    return caught.value.found.removeprefix("Modelfile, ")


def test_files_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf())
    assert parse_modelfile("FROM ./a.gguf", folder=tmp_path).model == "./a.gguf"
    assert refusal("FROM ./c.gguf", tmp_path) == (
        f"line 1: FROM names './c.gguf', and there is no {tmp_path / 'c.gguf'}: "
        "Ollama would take it for the name of a model to download"
    )
    assert (
        refusal("FROM a.gguf\nADAPTER d", tmp_path)
        == f"line 2: ADAPTER names 'd', and there is no {tmp_path / 'd'}"
    )
    assert refusal("FROM a.gguf/b", tmp_path).startswith("line 1: FROM names 'a.gguf/b', and there is no ")


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    reason = "which is neither a file nor a folder"
    assert refusal("FROM ./pipe.gguf", tmp_path) == f"line 1: FROM names './pipe.gguf', {reason}"
    assert refusal("FROM /dev/zero", tmp_path) == f"line 1: FROM names '/dev/zero', {reason}"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~nosuchuser/m.gguf", "FROM names '~nosuchuser/m.gguf', the folder of an unknown user"),
        ("a" * 5000, f"FROM names '{'a' * 57}...': File name too long"),
        ("loop", "FROM names 'loop': Too many levels of symbolic links"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(f"FROM {path}", tmp_path) == f"line 1: {reason}"


@pytest.mark.parametrize(
    ("command", "held", "taken"),
    [
        ("FROM", "config.json", False),
        ("FROM", "adapter_model.safetensors", False),
        ("FROM", "model-00001-of-00002.safetensors", True),
        ("FROM", "pytorch_model.bin", True),
        ("FROM", "m.gguf", True),
        ("ADAPTER", "config.json", False),
        ("ADAPTER", "adapter_model.safetensors", True),
    ],
)
def test_a_folder_has_to_hold_a_model(command: str, held: str, taken: bool, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / held).write_bytes(b"")
    text = "FROM ./folder" if command == "FROM" else "FROM m.gguf\nADAPTER ./folder"
    if taken:
        parse_modelfile(text, folder=tmp_path)
        return
    assert refusal(text, tmp_path) == (
        "line 1: FROM names './folder', a folder with none of model*.safetensors, consolidated*.safetensors, "
        "pytorch_model*.bin, consolidated*.pth, *.gguf, *.bin"
        if command == "FROM"
        else "line 2: ADAPTER names './folder', a folder with none of *.safetensors, *.gguf, *.bin"
    )


@pytest.mark.parametrize(
    "unit",
    ['SYSTEM "open\n', "x\n", "\n", "PARAMETER stop a\n", "{{ .System }}\n", "# a\n", "LICENSE a\n", " \t", '"\n'],
)
@pytest.mark.parametrize("begin", ["", 'SYSTEM """', 'TEMPLATE """'])
def test_the_time_grows_with_the_length(begin: str, unit: str) -> None:
    text = f"FROM m\n{begin}" + unit * (300_000 // len(unit))
    start = time.process_time()
    error_of(text)
    error_of(text + '"""')
    assert time.process_time() - start < 10  # half a second; in square time, minutes


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
        ("a\u200db", "U+200D in 'a\\u200db', which Ollama drops"),
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


def test_the_ranges_of_the_parameters() -> None:
    assert {name: str(kind) for name, kind in PARAMETERS.items()} == {
        "num_ctx": "a whole number of at least 1",
        "num_predict": "a whole number of at least -2",
        "num_keep": "a whole number of at least -1",
        "num_batch": "a whole number of at least 1",
        "num_gpu": "a whole number of at least -1",
        "main_gpu": "a whole number of at least 0",
        "num_thread": "a whole number of at least 0",
        "use_mmap": "true or false",
        "seed": "a whole number",
        "temperature": "a number of at least 0",
        "top_k": "a whole number of at least 0",
        "top_p": "a number from 0 to 1",
        "min_p": "a number from 0 to 1",
        "typical_p": "a number from 0 to 1",
        "repeat_last_n": "a whole number of at least -1",
        "repeat_penalty": "a number above 0",
        "presence_penalty": "a number from -2 to 2",
        "frequency_penalty": "a number from -2 to 2",
        "stop": "a text",
    }
