"""Go's text/template as Ollama uses it: parsed to a tree, which is checked and, for chat templates, executed.

The syntax is that of https://pkg.go.dev/text/template; functions and variables are those that Ollama adds
(https://docs.ollama.com/modelfile#template). Tests hold both the verdicts and the texts against Go itself.
"""

from __future__ import annotations

import bisect
import graphlib
import json
import math
import re
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

BUILTINS = frozenset(
    [
        "and",
        "call",
        "eq",
        "ge",
        "gt",
        "html",
        "index",
        "js",
        "le",
        "len",
        "lt",
        "ne",
        "not",
        "or",
        "print",
        "printf",
        "println",
        "slice",
        "urlquery",
    ]
)
OLLAMA_FUNCTIONS = frozenset({"json", "currentDate", "yesterdayDate", "toTypeScriptType"})

_FUNCTION_CALL = {"Name": None, "Arguments": None, "Index": None}
_MESSAGE = {
    "Role": None,
    "Content": None,
    "Thinking": None,
    "Images": None,
    "ToolCalls": [{"ID": None, "Function": _FUNCTION_CALL}],
    "ToolName": None,
    "ToolCallID": None,
}
_TOOL = {"Type": None, "Items": None, "Function": {"Name": None, "Description": None, "Parameters": None}}
VARIABLES: Mapping[str, Any] = {
    "System": None,
    "Prompt": None,
    "Response": None,
    "Suffix": None,
    "Messages": [_MESSAGE],
    "Tools": [_TOOL],
    "Think": None,
    "ThinkLevel": None,
    "IsThinkSet": None,
    "Query": None,
    "Document": None,
    "Instruction": None,
}
"""What a template of Ollama's sees: a mapping has fields, a list elements, and None is not looked into."""

MAX_DEPTH = 100
"""How deep blocks and parentheses may lie inside of one another. Go allows 10,000 parentheses and any number of
blocks; here each takes up to four of the 1,000 frames that Python has, and no template of Ollama's has ten."""


class Lines:
    """In which line, from 1, a place of a text is; the text is gone through once."""

    def __init__(self, text: str) -> None:
        self._ends = [found.start() for found in re.finditer("\n", text)]

    def at(self, place: int) -> int:
        return bisect.bisect_left(self._ends, place) + 1


class GoTemplateError(ValueError):
    """A template that Go would not parse or execute, or that names what Ollama does not have.

    Attributes:
        line: of the template, from 1.
        reason: what is wrong there.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line} of the template: {reason}")
        self.line = line
        self.reason = reason


# --- the tree ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Literal:
    """A string, number, boolean or nil."""

    value: str | int | float | bool | None


@dataclass(frozen=True)
class Path:
    """`.A.B` (root "."), `$x.A` (root "$x") or `(…).A` (root a pipeline), and the fields looked up in it."""

    root: str | Pipe
    fields: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Function:
    name: str
    line: int


Operand = Literal | Path | Function


@dataclass(frozen=True)
class Pipe:
    """Commands, each with what the one before it gave as its last argument; perhaps kept in variables."""

    variables: tuple[str, ...]
    declares: bool
    commands: tuple[tuple[Operand, ...], ...]


@dataclass(frozen=True)
class Action:
    pipe: Pipe


@dataclass(frozen=True)
class Branch:
    """`if`, `with` or `range`."""

    kind: str
    pipe: Pipe
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]


@dataclass(frozen=True)
class Jump:
    """`break` or `continue`."""

    kind: str


@dataclass(frozen=True)
class Call:
    """`template "name" pipe`."""

    name: str
    pipe: Pipe | None
    line: int


Node = Text | Action | Branch | Jump | Call


@dataclass(frozen=True)
class GoTemplate:
    """A template that was parsed."""

    body: tuple[Node, ...]

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for `values`, such as System and Messages.

        Strings, numbers, booleans, lists and mappings are read. Of the functions, those that compare, choose, count
        and cut are executed: what a chat template needs.

        Raises:
            GoTemplateError: a function that is not executed here, or a field that `values` lacks.
        """
        return _Execution(values).run(self.body)


# --- characters to tokens ---------------------------------------------------------------------------

_SPACE = " \t\r\n"
_SPACES = re.compile(f"[{_SPACE}]*")
_KEYWORDS = frozenset(
    [
        "block",
        "break",
        "continue",
        "define",
        "else",
        "end",
        "if",
        "range",
        "template",
        "with",
        "nil",
        "true",
        "false",
    ]
)
_TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\n])*") | (?P<raw>`[^`]*`) | (?P<char>'(?:\\.[^'\n]*|[^'\\\n])')
      | (?P<number>[+-]?(?:0[xX][0-9a-fA-F_]+|\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+))
      | (?P<field>\.\w+) | (?P<variable>\$\w*) | (?P<word>\w+) | (?P<declare>:=) | (?P<mark>[=|(),.])""",
    re.VERBOSE,
)
_WORDLIKE = frozenset({"field", "variable", "word", "number"})


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int
    spaced: bool
    """Whether white space stands before it."""


@dataclass(frozen=True)
class _Tokens:
    """What stands between `{{` and `}}`."""

    tokens: tuple[_Token, ...]
    line: int


def _pieces(source: str) -> Iterator[str | _Tokens]:
    """Texts, with what `{{-` and `-}}` trim taken off, and actions; comments are left out."""
    lines = Lines(source)
    place, trim = 0, False
    while True:
        start = source.find("{{", place)
        text = source[place:] if start < 0 else source[place:start]
        if trim:
            text = text.lstrip(_SPACE)
        if start < 0:
            yield text
            return
        inside = start + 2
        if source.startswith("-", inside) and source[inside + 1 : inside + 2] in tuple(_SPACE):
            text, inside = text.rstrip(_SPACE), inside + 2
        yield text
        if source.startswith("/*", inside):
            place, trim = _comment(source, inside, lines)
        else:
            tokens, place, trim = _action(source, inside, lines)
            yield tokens


def _comment(source: str, start: int, lines: Lines) -> tuple[int, bool]:
    closed = source.find("*/", start + 2)
    if closed < 0:
        _fail(lines.at(start), "a comment without its `*/`")
    end = re.compile(r"(\s-)?\}\}").match(source, closed + 2)
    if end is None:
        _fail(lines.at(closed), "a comment is not followed by its `}}`")
    return end.end(), bool(end.group(1))


def _action(source: str, start: int, lines: Lines) -> tuple[_Tokens, int, bool]:
    """The tokens of the action whose inside begins at `start`, where it ends, and whether it trims behind it."""
    tokens: list[_Token] = []
    place, line = start, lines.at(start)
    while True:
        before = place
        place = _after_spaces(source, before)
        spaced = place > before
        if spaced and source.startswith("-}}", place):
            return _Tokens(tuple(tokens), line), place + 3, True
        if source.startswith("}}", place):
            return _Tokens(tuple(tokens), line), place + 2, False
        if place >= len(source):
            _fail(line, "an action without its `}}`")
        found = _TOKEN.match(source, place)
        here = lines.at(place)
        if found is None:
            if source[place] in "\"`'":
                _fail(here, f"a string without its closing {source[place]}")
            _fail(here, f"an unexpected {source[place]!r} in an action")
        kind = str(found.lastgroup)
        if kind in _WORDLIKE and (source[found.end() : found.end() + 1] or " ") not in f"{_SPACE}.,|:()}}":
            _fail(here, f"an unexpected {source[found.end()]!r} behind {found.group()!r}")
        tokens.append(_Token(kind, found.group(), here, spaced))
        place = found.end()


def _after_spaces(source: str, place: int) -> int:
    found = _SPACES.match(source, place)
    return found.end() if found else place


def _fail(line: int, reason: str) -> NoReturn:
    raise GoTemplateError(line, reason)


# --- tokens to the tree -----------------------------------------------------------------------------


def parse_go_template(source: str) -> GoTemplate:
    """The template that `source` spells.

    Raises:
        GoTemplateError: Go would not parse it; it names a function or a variable that Ollama does not have, or a
            template that it does not define; or a template in it includes itself without end.
    """
    parser = _Parser(source)
    body, end = parser.nodes()
    if end is not None:
        _fail(end.line, f"an {{{{ {end.tokens[0].text} }}}} without its if, range or with")
    parser.keep("", body, source.count("\n") + 1)  # Ollama gives the whole template no name
    _check_names(body, VARIABLES, ChainMap({"$": VARIABLES}))
    _check_calls(parser.defined)
    return GoTemplate(body)


class _Scope:
    """What is known at a place of a template: how deep it lies, in how many ranges, and the variables."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.loops = 0
        self._names = ["$"]
        self._times = Counter(self._names)

    def go_deeper(self, line: int) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            _fail(line, f"more than {MAX_DEPTH} blocks and parentheses inside of one another")

    def __contains__(self, name: str) -> bool:
        return self._times[name] > 0

    def __len__(self) -> int:
        return len(self._names)

    def declare(self, names: Sequence[str]) -> None:
        self._names += names
        self._times.update(names)

    def forget(self, kept: int) -> None:
        """All but the first `kept`."""
        self._times.subtract(self._names[kept:])
        del self._names[kept:]


class _Parser:
    def __init__(self, source: str) -> None:
        self.pieces = _pieces(source)
        self.defined: dict[str, tuple[Node, ...]] = {}
        self.scope = _Scope(0)

    def nodes(self) -> tuple[tuple[Node, ...], _Tokens | None]:
        """Nodes until the `end` or `else` that closes them; None at the end of the text."""
        found: list[Node] = []
        for piece in self.pieces:
            if isinstance(piece, str):
                if piece:
                    found.append(Text(piece))
                continue
            word = piece.tokens[0].text if piece.tokens and piece.tokens[0].kind == "word" else None
            if word in ("end", "else"):
                return tuple(found), piece
            node = self.statement(word, piece)
            if node is not None:
                found.append(node)
        return tuple(found), None

    def statement(self, word: str | None, piece: _Tokens) -> Node | None:
        cursor = _Cursor(piece, self.scope)
        if word in ("if", "with", "range"):
            return self.branch(str(word), cursor.skip())
        if word in ("break", "continue"):
            cursor.skip().finish(str(word))
            if not self.scope.loops:
                _fail(piece.line, f"a {{{{ {word} }}}} outside of a range")
            return Jump(str(word))
        if word == "define":
            self.define(cursor.skip())
            return None
        if word == "block":
            return self.block(cursor.skip())
        if word == "template":
            cursor.skip()
            name = cursor.string("template")
            return Call(name, None if cursor.done() else cursor.pipe("template"), piece.line)
        return Action(cursor.pipe("an action"))

    def branch(self, kind: str, cursor: _Cursor) -> Branch:
        scope, line = self.scope, cursor.line
        seen = len(scope)
        scope.go_deeper(line)
        pipe = cursor.pipe(kind, most=2 if kind == "range" else 1)
        scope.loops += kind == "range"
        body, end = self.nodes()
        scope.loops -= kind == "range"
        otherwise: tuple[Node, ...] = ()
        if end is not None and end.tokens[0].text == "else":
            rest = _Cursor(end, scope).skip()
            if kind != "range" and rest.word() == kind:
                # `else if` and `else with` share the `end` of what they continue.
                otherwise = (self.branch(kind, rest.skip()),)
                end = None
            else:
                rest.finish("else")
                otherwise, end = self.nodes()
                self.closed(kind, line, end)
        else:
            self.closed(kind, line, end)
        scope.depth -= 1
        scope.forget(seen)
        return Branch(kind, pipe, body, otherwise)

    def closed(self, kind: str, line: int, end: _Tokens | None) -> None:
        if end is None:
            _fail(line, f"{{{{ {kind} }}}} without its {{{{ end }}}}")
        if end.tokens[0].text != "end":
            _fail(end.line, f"a second {{{{ else }}}} of the {{{{ {kind} }}}} in line {line}")
        _Cursor(end, self.scope).skip().finish("end")

    def define(self, cursor: _Cursor) -> None:
        name = cursor.string("define")
        cursor.finish("define")
        if self.scope.depth:
            _fail(cursor.line, "a define inside of another action")
        self.body_of("define", name, cursor.line)

    def block(self, cursor: _Cursor) -> Call:
        name = cursor.string("block")
        pipe = cursor.pipe("block")
        self.body_of("block", name, cursor.line)
        return Call(name, pipe, cursor.line)

    def body_of(self, kind: str, name: str, line: int) -> None:
        outer = self.scope
        self.scope = _Scope(outer.depth)
        self.scope.go_deeper(line)
        body, end = self.nodes()
        self.closed(kind, line, end)
        self.scope = outer
        self.keep(name, body, end.line if end is not None else line)

    def keep(self, name: str, body: tuple[Node, ...], line: int) -> None:
        """One that is blank gives way to another of its name."""
        kept = self.defined.get(name, ())
        if not _is_blank(body) and not _is_blank(kept):
            _fail(line, f"a second template {name!r}")
        self.defined[name] = kept if _is_blank(body) else body


def _is_blank(body: Sequence[Node]) -> bool:
    """Whether it holds white space alone."""
    return all(isinstance(node, Text) and not node.text.strip() for node in body)


class _Cursor:
    """Reads one action."""

    def __init__(self, piece: _Tokens, scope: _Scope) -> None:
        self.tokens = piece.tokens
        self.line = piece.line
        self.scope = scope
        self.place = 0

    def done(self) -> bool:
        return self.place >= len(self.tokens)

    def peek(self, ahead: int = 0) -> _Token | None:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def skip(self) -> _Cursor:
        self.place += 1
        return self

    def word(self) -> str | None:
        token = self.peek()
        return token.text if token is not None and token.kind == "word" else None

    def string(self, context: str) -> str:
        token = self.peek()
        if token is None or token.kind not in ("string", "raw"):
            _fail(self.line, f"{{{{ {context} }}}} without a name in quotes")
        self.skip()
        return _text_of(token)

    def finish(self, context: str) -> None:
        token = self.peek()
        if token is not None:
            _fail(token.line, f"an unexpected {token.text!r} in {{{{ {context} }}}}")

    def pipe(self, context: str, *, most: int = 1, inner: bool = False) -> Pipe:
        """A pipeline up to the end of the action, or up to the `)` that closes it."""
        variables, declares = self.declared(most)
        commands: list[tuple[Operand, ...]] = []
        while not self.at_end(inner):
            commands.append(self.command(inner))
        if not commands:
            _fail(self.line, f"no value for {context}" if context != "an action" else "an empty action")
        for command in commands[1:]:
            if isinstance(command[0], Literal) or command[0] == Path(".", (), self.line):
                _fail(self.line, "a value behind a `|`, where a function belongs")
        if declares:
            self.scope.declare(variables)
        if not inner:
            self.finish(context)
        return Pipe(variables, declares, tuple(commands))

    def at_end(self, inner: bool) -> bool:
        token = self.peek()
        if token is None:
            if inner:
                _fail(self.line, "a `(` without its `)`")
            return True
        return inner and token.text == ")"

    def declared(self, most: int) -> tuple[tuple[str, ...], bool]:
        """`$x :=`, `$x =`, and in a range `$i, $x :=`."""
        names: list[str] = []
        ahead = 0
        while (token := self.peek(ahead)) is not None and token.kind == "variable":
            sign = self.peek(ahead + 1)
            if sign is None:
                return (), False
            names.append(token.text)
            if sign.text in (":=", "="):
                self.place += ahead + 2
                self.check_declared(names, declares=sign.text == ":=")
                return tuple(names), sign.text == ":="
            if sign.text != "," or len(names) >= most:
                break
            ahead += 2
        if names and (sign := self.peek(ahead + 1)) is not None and sign.text == ",":
            _fail(sign.line, "too many variables are declared")
        return (), False

    def check_declared(self, names: Sequence[str], *, declares: bool) -> None:
        for name in names:
            if not declares and name not in self.scope:
                _fail(self.line, f"the variable {name} is not declared")

    def command(self, inner: bool) -> tuple[Operand, ...]:
        operands = [self.operand()]
        while not self.at_end(inner):
            token = self.tokens[self.place]
            if token.text == "|":
                self.skip()
                break
            if not token.spaced:
                _fail(token.line, f"an unexpected {token.text!r} in an action")
            operands.append(self.operand())
        return tuple(operands)

    def operand(self) -> Operand:
        token = self.tokens[self.place]
        self.skip()
        root = self.term(token)
        fields: list[str] = []
        while (following := self.peek()) is not None and following.kind == "field" and not following.spaced:
            fields.append(following.text[1:])
            self.skip()
        if not fields:
            return root
        if not isinstance(root, Path) or token.text == ".":
            _fail(token.line, f"an unexpected {'.' + fields[0]!r} behind {token.text!r}")
        return Path(root.root, (*root.fields, *fields), root.line)

    def term(self, token: _Token) -> Operand:
        if token.kind == "field":
            return Path(".", (token.text[1:],), token.line)
        if token.text == ".":
            return Path(".", (), token.line)
        if token.kind == "variable":
            if token.text not in self.scope:
                _fail(token.line, f"the variable {token.text} is not declared")
            return Path(token.text, (), token.line)
        if token.text == "(":
            self.scope.go_deeper(token.line)
            pipe = self.pipe("parentheses", inner=True)
            self.scope.depth -= 1
            self.skip()
            return Path(pipe, (), token.line)
        if token.kind == "word" and token.text not in _KEYWORDS:
            if token.text not in BUILTINS | OLLAMA_FUNCTIONS:
                _fail(token.line, f"the function {token.text!r} is not one of Ollama's")
            return Function(token.text, token.line)
        return _literal(token)


_NAMED = {"true": True, "false": False, "nil": None}


def _literal(token: _Token) -> Literal:
    if token.kind in ("string", "raw", "char"):
        return Literal(_text_of(token) if token.kind != "char" else ord(_text_of(token)[0]))
    if token.kind == "word" and token.text in _NAMED:
        return Literal(_NAMED[token.text])
    if token.kind == "number":
        return Literal(_number(token))
    _fail(token.line, f"an unexpected {token.text!r} in an action")


def _number(token: _Token) -> int | float:
    """As Go reads it: a whole number has 64 bits, and one that begins with 0 is octal."""
    text = token.text
    octal = re.fullmatch(r"[+-]?0[0-7_]+", text)
    try:
        whole = int(text, 8 if octal else 0)
    except ValueError:  # no whole number, or one of more than 4,300 digits
        if re.search("[.eE]", text) and math.isfinite(number := float(text.replace("_", ""))):
            return number
    else:
        if -(2**63) <= whole < 2**63:
            return whole
    shown = text if len(text) <= 40 else text[:37] + "..."
    _fail(token.line, f"the number {shown} does not fit into 64 bits")


def _text_of(token: _Token) -> str:
    """What a quoted string means. Go's escapes are JSON's and a few more, which are put as JSON's here."""
    if token.kind == "raw":
        return token.text[1:-1]
    inner = token.text[1:-1]
    put = re.sub(r"\\(?:x([0-9a-fA-F]{2})|([av'])|.)", _as_json, inner)
    try:
        return str(json.loads(f'"{put}"', strict=False))
    except ValueError:
        _fail(token.line, f"a string with an unknown escape: {token.text}")


def _as_json(found: re.Match[str]) -> str:
    if found.group(1):
        return f"\\u00{found.group(1)}"
    return {"a": "\\u0007", "v": "\\u000b", "'": "'"}.get(found.group(2) or "", found.group())


# --- names ------------------------------------------------------------------------------------------


def _check_names(nodes: Sequence[Node], dot: Any, known: ChainMap[str, Any]) -> None:
    """Refuse a field that is not there, where what is looked into is known: Go would print `<no value>`."""
    for node in nodes:
        if isinstance(node, Action):
            value = _kind_of(node.pipe, dot, known)
            known.update(dict.fromkeys(node.pipe.variables, value))
        elif isinstance(node, Branch):
            value = _kind_of(node.pipe, dot, known)
            element = value[0] if isinstance(value, list) else None
            kinds = [element] if len(node.pipe.variables) == 1 else [None, element]
            inside = known.new_child()
            for name, kind in zip(node.pipe.variables, kinds, strict=False):
                inside[name] = kind if node.kind == "range" else value
            new_dot = {"range": element, "with": value}.get(node.kind, dot)
            _check_names(node.body, new_dot, inside.new_child())
            _check_names(node.otherwise, dot, inside.new_child())
        elif isinstance(node, Call) and node.pipe is not None:
            _kind_of(node.pipe, dot, known)


def _check_calls(bodies: Mapping[str, Sequence[Node]]) -> None:
    """Refuse a template that Go would not find, or would execute without end.

    Without end are two circles: of calls outside of every block, and of calls that hand on what they were given, so
    that each round decides as the one before it. One that looks into its value comes to an end, and is let pass.
    """
    always: dict[str, dict[str, int]] = {name: {} for name in bodies}
    unchanged: dict[str, dict[str, int]] = {name: {} for name in bodies}
    for name, body in bodies.items():
        for call, in_block, moved in _calls(body, in_block=False, moved=False):
            if call.name not in bodies:
                _fail(call.line, f"the template {call.name!r} is not defined")
            if not in_block:
                always[name].setdefault(call.name, call.line)
            if _hands_on(call, moved=moved):
                unchanged[name].setdefault(call.name, call.line)
    for edges in (always, unchanged):
        try:
            graphlib.TopologicalSorter(edges).prepare()
        except graphlib.CycleError as failure:
            called, caller = failure.args[1][:2]
            _fail(edges[caller][called], f"the template {called!r} includes itself without end")


def _calls(nodes: Sequence[Node], *, in_block: bool, moved: bool) -> Iterator[tuple[Call, bool, bool]]:
    """Each call, whether a block may leave it out, and whether `.` is another there than at the beginning."""
    for node in nodes:
        if isinstance(node, Call):
            yield node, in_block, moved
        elif isinstance(node, Branch):
            yield from _calls(node.body, in_block=True, moved=moved or node.kind != "if")
            yield from _calls(node.otherwise, in_block=True, moved=moved)


def _hands_on(call: Call, *, moved: bool) -> bool:
    """Whether the template that is called gets what the one that calls it got."""
    commands = () if call.pipe is None else call.pipe.commands
    if len(commands) != 1 or len(commands[0]) != 1:
        return False
    given = commands[0][0]
    return isinstance(given, Path) and not given.fields and (given.root == "$" or (given.root == "." and not moved))


def _kind_of(pipe: Pipe, dot: Any, variables: Mapping[str, Any]) -> Any:
    """What the pipeline gives, as :data:`VARIABLES` describes it; None where that is not known."""
    kinds = [[_kind_of_operand(operand, dot, variables) for operand in command] for command in pipe.commands]
    return kinds[0][0] if len(kinds) == 1 and len(kinds[0]) == 1 else None


def _kind_of_operand(operand: Operand, dot: Any, variables: Mapping[str, Any]) -> Any:
    if not isinstance(operand, Path):
        return None
    if isinstance(operand.root, Pipe):
        kind = _kind_of(operand.root, dot, variables)
    else:
        kind = dot if operand.root == "." else variables.get(operand.root)
    for field in operand.fields:
        if not isinstance(kind, dict):
            return None
        if field not in kind:
            _fail(
                operand.line,
                f"the variable .{field} is not one of Ollama's: {', '.join(f'.{name}' for name in kind)}",
            )
        kind = kind[field]
    return kind


# --- execution --------------------------------------------------------------------------------------


class _Break(Exception):  # noqa: N818 - a jump, no error
    """Leaves a range."""


class _Continue(Exception):  # noqa: N818
    """Goes on with a range's next element."""


class _Execution:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self.variables: list[tuple[str, Any]] = [("$", values)]
        self.values = values
        self.written: list[str] = []

    def run(self, body: Sequence[Node]) -> str:
        self.walk(body, self.values)
        return "".join(self.written)

    def walk(self, nodes: Sequence[Node], dot: Any) -> None:
        for node in nodes:
            if isinstance(node, Text):
                self.written.append(node.text)
            elif isinstance(node, Action):
                value = self.pipe(node.pipe, dot)
                if not node.pipe.variables:
                    self.written.append(_printed(value))
            elif isinstance(node, Branch):
                seen = len(self.variables)
                self.branch(node, dot)
                del self.variables[seen:]
            elif isinstance(node, Jump):
                raise _Break if node.kind == "break" else _Continue
            else:
                _fail(node.line, f"the template {node.name!r} is not executed here")

    def branch(self, node: Branch, dot: Any) -> None:
        if node.kind == "range":
            self.loop(node, dot)
            return
        value = self.pipe(node.pipe, dot)
        if _true(value):
            self.walk(node.body, value if node.kind == "with" else dot)
        else:
            self.walk(node.otherwise, dot)

    def loop(self, node: Branch, dot: Any) -> None:
        values = self.pipe(Pipe((), False, node.pipe.commands), dot)
        seen = len(self.variables)
        for place, value in enumerate(values or ()):
            given = (value,) if len(node.pipe.variables) == 1 else (place, value)
            self.variables += zip(node.pipe.variables, given, strict=False)
            try:
                self.walk(node.body, value)
            except _Break:
                break
            except _Continue:
                continue
            finally:
                del self.variables[seen:]
        if not values:
            self.walk(node.otherwise, dot)

    def pipe(self, pipe: Pipe, dot: Any) -> Any:
        value: Any = None
        for place, command in enumerate(pipe.commands):
            value = self.command(command, dot, [] if place == 0 else [value])
        for name in pipe.variables:
            if pipe.declares:
                self.variables.append((name, value))
            else:
                place = max(index for index, (known, _) in enumerate(self.variables) if known == name)
                self.variables[place] = (name, value)
        return value

    def command(self, command: Sequence[Operand], dot: Any, last: list[Any]) -> Any:
        first = command[0]
        if not isinstance(first, Function):
            return self.operand(first, dot)
        function = _FUNCTIONS.get(first.name)
        if function is None:
            _fail(first.line, f"the function {first.name} is not executed here")
        return function(*(self.operand(operand, dot) for operand in command[1:]), *last)

    def operand(self, operand: Operand, dot: Any) -> Any:
        if isinstance(operand, Literal):
            return operand.value
        if isinstance(operand, Function):
            return self.command([operand], dot, [])
        if isinstance(operand.root, Pipe):
            value = self.pipe(operand.root, dot)
        elif operand.root == ".":
            value = dot
        else:
            value = next(kept for name, kept in reversed(self.variables) if name == operand.root)
        for field in operand.fields:
            if not isinstance(value, Mapping) or field not in value:
                _fail(operand.line, f"there is no .{field} in what is rendered")
            value = value[field]
        return value


def _true(value: Any) -> bool:
    """Go's truth: neither nil, false, zero nor empty."""
    return bool(value)


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "<no value>" if value is None else str(value)


def _and(*values: Any) -> Any:
    return next((value for value in values if not _true(value)), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if _true(value)), values[-1])


def _index(value: Any, *places: Any) -> Any:
    for place in places:
        value = value[place]
    return value


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    return value[start:end]


def _length(value: Any) -> int:
    """A string's in bytes."""
    return len(value.encode("utf-8")) if isinstance(value, str) else len(value)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "and": _and,
    "or": _or,
    "not": lambda value: not _true(value),
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, other: first != other,
    "lt": lambda first, other: first < other,
    "le": lambda first, other: first <= other,
    "gt": lambda first, other: first > other,
    "ge": lambda first, other: first >= other,
    "len": _length,
    "index": _index,
    "slice": _slice,
}
