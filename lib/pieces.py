"""Cut a Python file into pieces, and lay out other code for their place.

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

from lib.files import unix_lines
from lib.sources import BROKEN, parse

DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(eq=False)
class Piece:
    """Statements on lines of their own; spans() leaves out what follows `statements`."""

    line: int  # numbers of the first and the last line
    last: int
    kind: str  # "definition", "import", "statements", "file"; "text" and "future" are not asked for
    name: str  # "load", "Table.load" or "line 3"
    statements: list  # their syntax trees
    start: int = 0  # offset in the file, in characters
    old: str = ""  # the lines, without the last one's line ending
    ending: str = "\n"  # of the lines
    indent: str = ""  # blanks before the first line
    code: str = ""  # the lines without that indentation; they end in "\n"


def split(text):
    """The lines of a text with their endings, split where Python splits them."""
    return io.StringIO(text, newline="").readlines()


def kind_of(node):
    """The kind of piece that a statement is."""
    if isinstance(node, DEFINITION):
        return "definition"
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "future" if getattr(node, "module", "") == "__future__" else "import"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "text"
    return "statements"


def spans(body, lines, fits=None, prefix=""):
    """The Pieces of a body, in order, without their text; without fits(code) all code fits."""
    found = []

    def fit(first, last):
        return not fits or fits("".join(lines[first - 1 : last]))

    for node in body:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        last = node.end_lineno
        kind = kind_of(node)
        before = found[-1] if found else Piece(0, 0, "", "", [node])
        alike = kind == before.kind and node.col_offset == before.statements[0].col_offset
        if first <= before.last or alike and kind == "statements" and fit(before.line, last):
            before.last = last
            before.kind = kind if kind == before.kind else "statements"
            before.statements.append(node)
        elif isinstance(node, ast.ClassDef) and last > first and not fit(first, last):
            found += spans(node.body, lines, fits, f"{prefix}{node.name}.")
        else:
            name = f"{prefix}{node.name}" if kind == "definition" else f"line {first}"
            found.append(Piece(first, last, kind, name, [node]))
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


def cut(text, fits=None, whole=False):
    """The Pieces of a file, in order; `whole`: one for all of it."""
    lines = split(text)
    body = parse(text).body
    found = spans(body, lines, fits)
    if whole and found:
        found = [Piece(found[0].line, found[-1].last, "file", "the file", body)]
    pieces = []
    for piece in found:
        piece.start = len("".join(lines[: piece.line - 1]))
        piece.old = "".join(lines[piece.line - 1 : piece.last]).rstrip("\r\n")
        piece.ending = re.search("\r\n|\r|\n", text[piece.start :] + text + "\n")[0]
        piece.code = unix_lines(piece.old)
        piece.indent = re.match("[ \t]*", piece.code)[0]
        with contextlib.suppress(*BROKEN):
            if piece.indent:
                rows = margins(piece.code)
                rows = [(margin or "").removeprefix(piece.indent) + rest for margin, rest in rows]
                piece.code = "\n".join(rows)
            same = ast.dump(parse(piece.code)) == ast.dump(ast.Module(piece.statements, []))
            if same and piece.kind not in ("text", "future"):
                pieces.append(piece)
    return pieces


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
