"""The messages that the source can give its users, read off it with `ast`.

What differs between calls is `{}`. A message is followed through the source as far as its words go: a name to
what its function assigns to it, a parameter to the calls that give it, a call to what that function returns,
a constant to its module.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

HOLE = "{}"
SAID = {"warn", "warning", "warning_once", "error", "absence"}  # functions and methods that tell a user
AS_IT_IS = {"one_line", "str", "repr", "sorted", "len", "join", "format", "type"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Message:
    """What one place of the source can say: its file, function and line, and the text with holes."""

    path: str
    function: str
    line: int
    text: str


class Source:
    """A set of Python files, and what their functions, calls and constants are called."""

    def __init__(self, root: Path, paths: Iterable[Path]):
        self.trees = {str(path.relative_to(root)): ast.parse(path.read_text()) for path in sorted(paths)}
        self.functions: dict[str, list[Function]] = defaultdict(list)
        self.calls: dict[str, list[tuple[ast.Call, Function | None]]] = defaultdict(list)
        self.constants: dict[str, list[ast.expr]] = defaultdict(list)
        self.home: dict[ast.AST, Function | None] = {}
        for tree in self.trees.values():
            for statement in tree.body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    self.constants[statement.targets[0].id].append(statement.value)
            self._visit(tree, None)

    def _visit(self, node: ast.AST, function: Function | None) -> None:
        for child in ast.iter_child_nodes(node):
            self.home[child] = function
            if isinstance(child, Function):
                self.functions[child.name].append(child)
            if isinstance(child, ast.Call):
                self.calls[_name(child.func)].append((child, function))
            self._visit(child, child if isinstance(child, Function) else function)

    @cached_property
    def messages(self) -> list[Message]:
        """Every text that is raised or said, each once for a place."""
        return [
            Message(path, getattr(self.home[node], "name", ""), getattr(node, "lineno", 0), text)
            for path, tree in self.trees.items()
            for node in ast.walk(tree)
            for said in _said(node)
            for text in dict.fromkeys(self.texts(said, self.home[node]))
        ]

    def texts(self, node: ast.expr | None, function: Function | None, depth: int = 6) -> list[str]:
        """Return what an expression of a function can be, as texts with holes."""
        if depth == 0:
            return [HOLE]
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else [HOLE]
        if isinstance(node, ast.JoinedStr):
            words = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values]
            inside = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            return ["".join(words), *self._sentences(inside, function, depth)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.texts(node.left, function, depth), self.texts(node.right, function, depth)
            ends = [right[0], *(text for text in right[1:] if text not in _own(right))]
            return [*(left[0] + end for end in ends), *_own(left[1:] + right[1:])]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, function, depth) + self.texts(node.orelse, function, depth)
        if isinstance(node, ast.BoolOp | ast.Dict | ast.List | ast.Tuple):
            values = node.elts if isinstance(node, ast.List | ast.Tuple) else node.values
            return [text for value in values for text in self.texts(value, function, depth)] or [HOLE]
        if isinstance(node, ast.Subscript | ast.Starred):
            return self.texts(node.value, function, depth)
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return self.texts(node.elt, function, depth)
        if isinstance(node, ast.Name):
            return self._named(node.id, function, depth) or [HOLE]
        if isinstance(node, ast.Call) and _name(node.func) not in AS_IT_IS:
            return self._returned(_name(node.func), depth) or [HOLE]
        return [HOLE]

    def _sentences(self, nodes: list[ast.expr], function: Function | None, depth: int) -> list[str]:
        """Return what stands in the holes of a text and is a sentence of its own."""
        texts = [text for node in nodes for text in self.texts(node, function, depth - 1)]
        return [text for text in _own(texts) if is_sentence(text, 3)]

    @cache  # noqa: B019
    def _named(self, name: str, function: Function | None, depth: int) -> list[str]:
        if function is None:
            return [text for value in self.constants[name] for text in self.texts(value, None, depth - 1)]
        values = [value for node in ast.walk(function) for value in _assigned(node, name)]
        found = [text for value in values for text in self.texts(value, function, depth - 1)]
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [parameter.arg for parameter in parameters]
        if name in names:
            found += self._given(function.name, name, [n for n in names if n not in ("self", "cls")], depth)
        return found or self._named(name, None, depth)

    def _given(self, function: str, parameter: str, names: list[str], depth: int) -> list[str]:
        place, texts = names.index(parameter), []
        for call, home in self.calls[function]:
            given = {word.arg: word.value for word in call.keywords}
            value = given.get(parameter) or (call.args[place] if place < len(call.args) else None)
            if value is not None and not any(isinstance(value, ast.Starred) for value in call.args):
                texts += self.texts(value, home, depth - 1)
        return texts

    @cache  # noqa: B019
    def _returned(self, function: str, depth: int) -> list[str]:
        return [
            text
            for definition in self.functions[function]
            for node in ast.walk(definition)
            if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and self.home[node] is definition
            for text in self.texts(node.value, definition, depth - 1)
            if text not in ("", HOLE)
        ]


def is_sentence(text: str, words: int = 2) -> bool:
    """Whether a text has words enough to be looked up."""
    return " " in text.strip() and len(re.findall("[A-Za-z]{2,}", text.replace(HOLE, ""))) >= words


def _own(texts: list[str]) -> list[str]:
    """Return the texts that do not go on with another."""
    return [text for text in texts if not text.startswith((" ", ",", ";", ":", "("))]


def _said(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the message of a node that raises or tells one."""
    if not isinstance(node, ast.Call):
        return
    name, words = _name(node.func), {word.arg for word in node.keywords}
    if name.endswith(("Error", "Exit")):
        yield from node.args[-1:] if name == "OSError" else node.args[:1]
    elif name in SAID or (name == "print" and "file" in words):
        yield from node.args[:1]


def _assigned(node: ast.AST, name: str) -> Iterator[ast.expr]:
    """Yield what a node gives a name, itself or as the variable of a loop over what is written there."""
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from _unpacked(target, node.value, name)
    elif isinstance(node, ast.AugAssign):
        yield from _unpacked(node.target, node.value, name)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
        yield from _unpacked(node.func.value, node.args[0], name)
    elif isinstance(node, ast.For | ast.comprehension):
        table = node.iter
        if (
            isinstance(table, ast.Call)
            and isinstance(table.func, ast.Attribute)
            and table.func.attr == "items"
        ):
            table = table.func.value
        if isinstance(table, ast.Dict):
            pairs = zip(table.keys, table.values, strict=True)
            rows: list[ast.expr] = [ast.Tuple([key, value]) for key, value in pairs if key is not None]
        else:
            rows = table.elts if isinstance(table, ast.Tuple | ast.List) else []
        for row in rows:
            yield from _unpacked(node.target, row, name)


def _unpacked(target: ast.expr, value: ast.expr | None, name: str) -> Iterator[ast.expr]:
    if isinstance(target, ast.Name) and target.id == name and value is not None:
        yield value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        if len(target.elts) == len(value.elts):
            for part, its_value in zip(target.elts, value.elts, strict=True):
                yield from _unpacked(part, its_value, name)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.IfExp):
        yield from _unpacked(target, value.body, name)
        yield from _unpacked(target, value.orelse, name)


def _name(function: ast.expr) -> str:
    """Return the last name of what is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
