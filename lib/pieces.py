"""Cut a Python file into pieces, and put other code in their place.

A piece is whole lines of the file: a definition with its decorators; of a class that does not fit,
each method; an import; or what stands between these, as many statements as fit. Comments around
pieces, strings that stand alone (docstrings), `from __future__`, the head of a class that is cut,
and lines that cannot be dedented without changing the code belong to no piece.
"""

import ast
import contextlib
import io
import re
import tokenize
from dataclasses import dataclass
from itertools import accumulate

from lib.files import unix_lines
from lib.sources import BROKEN, parse

DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ENDING = "\r\n|\r|\n"
LINE = re.compile(f"[^\r\n]*(?:{ENDING})|[^\r\n]+")  # Python splits at no other character


@dataclass(frozen=True)
class Piece:
    """text[start:end] of a file: whole lines, without the last one's line ending."""

    start: int  # offsets, in characters
    end: int
    line: int  # number of the first line
    kind: str  # "definition", "import", "statements", or "file"
    name: str  # "load", "Table.load" or "line 3"
    indent: str  # blanks before the first line
    ending: str  # of its lines
    code: str  # without that indentation; its lines end in "\n"


def kind_of(node):
    """The kind of piece that a statement is; "future" and "text" are no piece."""
    if isinstance(node, DEFINITION):
        return "definition"
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "future" if getattr(node, "module", "") == "__future__" else "import"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "text"
    return "statements"


def spans(body, lines, fits, prefix=""):
    """[[first line, last line, kind, name, statements]] of a body, in order."""
    found = []
    for node in body:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        last = node.end_lineno
        kind = kind_of(node)
        before = found[-1] if found else [0, 0, "", "", [node]]
        joined = kind == before[2] == "statements" and before[4][0].col_offset == node.col_offset
        inner = node.body[0] if isinstance(node, ast.ClassDef) else node
        own_lines = lines[inner.lineno - 1][: inner.col_offset].isspace()
        if first <= before[1] or joined and fits("".join(lines[before[0] - 1 : last])):
            before[1] = last
            before[2] = kind if kind == before[2] else "statements"
            before[4].append(node)
        elif inner != node and own_lines and not fits("".join(lines[first - 1 : last])):
            found += spans(node.body, lines, fits, f"{prefix}{node.name}.")
        else:
            name = f"{prefix}{node.name}" if kind == "definition" else f"line {first}"
            found.append([first, last, kind, name, [node]])
    return found


def margins(code):
    """[(indentation, rest)] of the lines; (None, line) if empty, or if it begins in a string."""
    inside = set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        inside.update(range(token.start[0], token.end[0]))  # only strings have more than one line
    found = []
    for number, line in enumerate(code.split("\n")):
        rest = line.lstrip(" \t")
        margin = line[: len(line) - len(rest)]
        found.append((margin, rest) if rest and number not in inside else (None, line))
    return found


def cut(text, fits):
    """The Pieces of a file, in order; without fits(lines) -> bool, one for all of it."""
    lines = LINE.findall(text)
    starts = [0, *accumulate(map(len, lines))]
    body = parse(text).body
    parts = spans(body, lines, fits or bool)
    if not fits and body:
        parts = [(parts[0][0], parts[-1][1], "file", "the file", body)]
    found = []
    for first, last, kind, name, nodes in parts:
        start = starts[first - 1]
        end = start + len(text[start : starts[last]].rstrip("\r\n"))
        indent = re.match("[ \t]*", text[start:])[0]
        ending = re.search(ENDING, text[start:] + text + "\n")[0]
        code = unix_lines(text[start:end])
        with contextlib.suppress(*BROKEN):
            if indent:
                dedented = [(m or "").removeprefix(indent) + rest for m, rest in margins(code)]
                code = "\n".join(dedented)
            same = ast.dump(parse(code)) == ast.dump(ast.Module(nodes, []))
            if same and kind not in ("text", "future"):
                found.append(Piece(start, end, first, kind, name, indent, ending, code))
    return found


def place(piece, code):
    """`code` with the indentation and the line endings of a piece."""
    old, new = [
        min((margin for margin, _ in margins(each) if margin), key=len, default="    ")
        for each in (code, piece.code)
    ]
    lines = []
    for margin, rest in margins(code):
        if margin is not None:
            depth, more = divmod(len(margin), len(old))
            rest = piece.indent + depth * new + more * " " + rest
        lines.append(rest)
    return piece.ending.join(lines)


def put(text, edits):
    """`text` with other code in some places, [(start, end, code)]; what is added comes first."""
    for start, end, code in sorted(edits, reverse=True):
        text = text[:start] + code + text[end:]
    return text
