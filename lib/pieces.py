"""Cut a Python file into pieces, and indent other code for their place.

A piece is whole lines of the file: a definition with its decorators; of a class that does not fit,
each method; an import; or as many statements between these as fit. Comments around pieces, strings
that stand alone, heads of classes that are cut, and lines that cannot be dedented are in none.
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
    kind: str  # "definition", "import", "statements", "file"; "text" is not asked for
    name: str  # "load", "Table.load" or "line 3"
    statements: list  # their syntax trees
    start: int = 0  # offset in the file, in characters
    old: str = ""  # the lines, without the last one's line ending
    ending: str = "\n"  # of the lines
    indent: str = ""  # blanks before the first line
    code: str = ""  # the lines without that indentation; they end in "\n"


def kind_of(node):
    """The kind of piece that a statement is."""
    if isinstance(node, DEFINITION):
        return "definition"
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "import"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "text"
    return "statements"


def spans(body, lines, fits, prefix=""):
    """The Pieces of a body, in order, without their text."""
    found = []
    for node in body:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        last = node.end_lineno
        kind = kind_of(node)
        before = found[-1] if found else Piece(0, 0, "", "", [node])
        aligned = node.col_offset == before.statements[0].col_offset
        joined = aligned and kind == before.kind == "statements"
        if first <= before.last or joined and fits(lines[before.line - 1 : last]):
            before.last = last
            before.kind = kind if kind == before.kind else "statements"
            before.statements.append(node)
        elif isinstance(node, ast.ClassDef) and last > first and not fits(lines[first - 1 : last]):
            found += spans(node.body, lines, fits, f"{prefix}{node.name}.")
        else:
            name = f"{prefix}{node.name}" if kind == "definition" else f"line {first}"
            found.append(Piece(first, last, kind, name, [node]))
    return found


def margins(code):
    """[(blanks before a line, its rest)]; (None, line) if empty, or if it begins in a string."""
    inside = set()
    with contextlib.suppress(*BROKEN):  # Python's parser takes more; take() compares the trees
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            inside.update(range(token.start[0], token.end[0]))  # only a string has several lines
    found = []
    for number, line in enumerate(code.split("\n")):
        rest = line.lstrip(" \t")
        blanks = line[: len(line) - len(rest)]
        found.append((blanks, rest) if rest and number not in inside else (None, line))
    return found


def step(code):
    """The blanks of one level of indentation in some code."""
    return min((blanks for blanks, _ in margins(code) if blanks), key=len, default="    ")


def indent(code, new, like):
    """`code` after the blanks `new`, its levels of indentation as wide as those of `like`."""
    narrow, wide = step(code), step(like)
    lines = []
    for blanks, rest in margins(code):
        if blanks is not None and narrow != wide:
            levels, more = divmod(len(blanks), len(narrow))
            blanks = levels * wide + more * " "
        lines.append(rest if blanks is None else new + blanks + rest)
    return "\n".join(lines)


def cut(text, fits=bool, whole=False):
    """The Pieces of a file, in order; whole: one for all of it.

    fits(lines) -> bool: whether a class, or some statements, may be one piece; by default all may.
    """
    lines = io.StringIO(text, newline="").readlines()  # ends lines where Python ends them
    body = parse(text).body
    found = spans(body, lines, fits)
    if whole and found:
        found = [Piece(found[0].line, found[-1].last, "file", "the file", body)]
    pieces = []
    for piece in found:
        piece.start = len("".join(lines[: piece.line - 1]))
        piece.old = "".join(lines[piece.line - 1 : piece.last]).rstrip("\r\n")
        piece.ending = re.search("\r\n|\r|\n", text[piece.start :] + text + "\n")[0]
        piece.indent = re.match("[ \t]*", piece.old)[0]
        with contextlib.suppress(*BROKEN):
            piece.code = unix_lines(piece.old)
            if piece.indent:
                parts = margins(piece.code)
                dedented = [(b or "").removeprefix(piece.indent) + rest for b, rest in parts]
                piece.code = "\n".join(dedented)
            same = ast.dump(parse(piece.code)) == ast.dump(ast.Module(piece.statements, []))
            if same and piece.kind != "text":
                pieces.append(piece)
    return pieces
