"""Pieces of a file, and what of an answer may take their place.

What stands outside the pieces that are asked for must survive any answer of a model.
"""

import ast
import inspect
import random
import re
import sys
import sysconfig
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import reward
from lib.pieces import cut
from lib.sources import Source
from tasks import answers

FILE = '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""Module.

    Indented.
"""
from __future__ import annotations

import os; import sys
import numpy as np
from numpy import (  # what we use
    in1d,
    array as make,
)

if TYPE_CHECKING:
    from numpy import bool8

LIMIT = 3; HALF = np.float_(LIMIT) / \\
    2


def one(x): return np.in1d(x, LIMIT)  # on one line


# about load
@os.cache
@deco(
    np.float_,
)
def load(path, *, mode="r", kind: np.float_ = np.float_(1)):
    """Load.

        Deep.
    """
    text = f"""
no indentation {path}
  two"""
\f
    return np.in1d(text, """a
b"""), make
    # the last word


async def fetch(url): # no blank
    return await url


class Table(Base):
    """A table."""

    rows = np.float_(3)
    cells = """
of text"""

    @property
    def size(self):
        return in1d(self.rows, [])

    @size.setter
    def size(self, value):
        self.rows = (value +
  1)

    class Row:
        """Nested."""

        def first(self):
            # why
            return np.in1d(self, 1)
  # at an odd column

    async def last(self): return os


try:
    import fast
except ImportError:
    def fast(x):
        return np.in1d(x, x)
for i in range(3):
    print(i)
"""a string
that stands alone"""
print(one(LIMIT))
# the end
'''
FORMS = {
    "plain": FILE,
    "CRLF": FILE.replace("\n", "\r\n"),
    "old Mac": FILE.replace("\n", "\r"),
    "no final newline": FILE.removesuffix("# the end\n").rstrip(),
    "mixed": "".join(line + "\r\n"[i % 2 :] for i, line in enumerate(FILE.split("\n"))),
    "tabs": re.sub(r"(?m)^(?:    )+", lambda m: "\t" * (len(m[0]) // 4), FILE),
    "two blanks": re.sub(r"(?m)^(?:    )+", lambda m: "  " * (len(m[0]) // 4), FILE),
}
LINES = re.compile("[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
LIMITS = {
    "long": lambda lines: True,
    "short": lambda lines: False,
    "some": lambda lines: sum(map(len, lines)) < 120,
}


def named(text, fits=LIMITS["short"]):
    return {piece.name: piece for piece in cut(text, fits)}


def end(piece):
    """The offset in its file where a piece ends."""
    return piece.start + len(piece.old)


def reply(code, logp=0.0):
    """An Answer with this code."""
    text = f"</think>\n<answer>\n```python\n{code}\n```\n</answer>"
    return SimpleNamespace(text=text, logp=logp, cut=False)


def settle(text, replies):
    """(new text, what became of the pieces) for {piece: codes of its answers}."""
    source = Source("x.py", text=text, new=text)
    asked = [(piece, [reply(code) for code in codes]) for piece, codes in replies.items()]
    fates = answers.settle(source, asked)
    return source.new, fates


# ------------------------------------------------------------------------- cut


def test_what_is_a_piece():
    """Stops comments, docstrings and heads of classes from being asked for, or code from being
    left out.
    """
    definitions = ["one", "load", "fetch"]
    methods = ["Table.size", "Table.size", "Table.Row.first", "Table.last"]
    found = {}
    for name, fits in LIMITS.items():
        found[name] = [(piece.kind, piece.name) for piece in cut(FILE, fits)]
    imports = [("import", f"line {number}") for number in (7, 9, 10, 11)]
    assert found["long"] == [
        *imports, ("statements", "line 16"),
        *[("definition", name) for name in (*definitions, "Table")],
        ("statements", "line 76"), ("statements", "line 85"),
    ]  # fmt: skip
    body = [("statements", "line 52"), ("statements", "line 53")]
    assert found["short"] == [
        *imports, ("statements", "line 16"), ("statements", "line 19"),
        *[("definition", name) for name in definitions], *body,
        *[("definition", name) for name in methods],
        *[("statements", f"line {number}") for number in (76, 81, 85)],
    ]  # fmt: skip
    assert found["some"][5:11] == [("definition", name) for name in definitions] + [
        ("statements", "line 52"), *[("definition", "Table.size")] * 2,
    ]  # fmt: skip
    [whole] = cut(FILE, whole=True)
    assert whole.kind == "file" and FILE[: whole.start].endswith("utf-8 -*-\n")
    assert FILE[end(whole) :] == "\n# the end\n"


EDGES = {  # file, names of its pieces
    "a line after a class": ("class A:\n    x = 1\ny = 2\nz = 3\n", ["line 2", "line 3"]),
    "a class on a line": ("class A: x = 1; y = 2\nclass B: pass\n", ["A", "B"]),
    "a class without more": ('class A:\n    """Doc."""\n', []),
    "a decorated method first": ("class A:\n    @f\n    def g(self): pass\n", ["A.g"]),
    "form feed in the indentation": (
        "class A:\n    def f(self):\n        x = 1\n\f        y = 2\n    def g(self): pass\n",
        ["A.g"],
    ),
    "statements that share lines": ("x = (1,\n2); y = 3; z = (\n4)\n", ["line 1"]),
    "imports that share a line": ("import a; import b\nimport c\n", ["line 1", "line 2"]),
    "a docstring that shares its line": ('"""Doc."""; x = 1\n', ["line 1"]),
    "an import that shares its line": ("import a; x = 1\n", ["line 1"]),
    "nothing": ("# only this\n", []),
    "a continued line": ("x = 1 + \\\n  2\n\\\ndef f(): pass\n", ["line 1", "f"]),
}


@pytest.mark.parametrize("case", EDGES)
def test_pieces_at_the_edges(case):
    """Stops code that no piece holds, two statements of different places in one piece, and a piece
    that means something else than its place in the file.
    """
    text, expected = EDGES[case]
    pieces = cut(text, lambda lines: not any("class" in line for line in lines))
    assert [piece.name for piece in pieces] == expected


@pytest.mark.parametrize("module", ["ast", "calendar", "difflib", "mailbox"])
def test_pieces_of_real_files(module):
    """Stops lines of a definition from being left out, and a method that is changed by dedenting.

    The oracles are inspect, which finds blocks by their tokens, and the tree of the whole file.
    """
    text = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text()
    lines = text.splitlines(keepends=True)
    pieces = cut(text, LIMITS["short"])
    assert len(pieces) > 20
    place = 0
    for piece in pieces:
        assert place <= piece.start < end(piece), "pieces overlap"
        place = end(piece)
        assert text[piece.start : place] == piece.old
        if piece.kind == "definition":
            block = "".join(inspect.getblock(lines[piece.line - 1 :]))
            assert block.startswith(piece.old + "\n")
            rest = block[len(piece.old) :].splitlines()
            assert all(not line.strip() or line.strip().startswith("#") for line in rest)
    functions = []
    bodies = [ast.parse(text)]
    for node in bodies:
        bodies += [each for each in node.body if isinstance(each, ast.ClassDef)]
        functions += [ast.dump(each) for each in node.body if isinstance(each, ast.FunctionDef)]
    asked = [ast.parse(piece.code).body[0] for piece in pieces if piece.kind == "definition"]
    defined = [ast.dump(node) for node in asked if isinstance(node, ast.FunctionDef)]
    assert sorted(defined) == sorted(functions)


# ------------------------------------------------------------------------- any answer

NOISE = (
    "\n", "    ", "\t", "  ", "def ", "f(x)", ":", "x", " = ", "return x", "class A", "import os",
    "from numpy import isin", '"""', "'", "#", "\\\n", "\\", "(", ")", "[", "{", "}", "\f", "\r",
    "\r\n", "\0", "\ufeff", "\u2028", "ä", "async ", "await x", "yield", "lambda: 0", "@", ";",
    "global x", "from __future__ import annotations", "from x import *", "x: int", "if x:\n    y",
)  # fmt: skip


def any_answer(rng, pieces):
    """Code as no one would write it: of this or another piece, cut, indented or mixed at random."""
    code = rng.choice(pieces).code
    kind = rng.randrange(9)
    if kind == 0:
        code = "".join(rng.choices(NOISE, k=rng.randrange(30)))
    elif kind == 1:
        code = code[: rng.randrange(len(code) + 1)]
    elif kind == 2:
        code = re.sub("(?m)^", rng.choice(["    ", "\t", " "]), code)
    elif kind == 3:
        code = code.replace("    ", rng.choice(["\t", " ", "      "]))
    elif kind == 4:
        place = rng.randrange(len(code) + 1)
        code = code[:place] + rng.choice(NOISE) + code[place:]
    elif kind == 5:
        code = f"{code}\n{rng.choice(pieces).code}"
    elif kind == 6:
        code = f"from numpy import isin\nimport scipy.stats\n{code.replace('in1d', 'isin')}"
    elif kind == 7:
        new = rng.choice(['"""x\n  y\n"""', "isin", "stats.x", "(1,\n2)", "x \\\n + 1"])
        code = re.sub(r"\bx\b|in1d", new.replace("\\", r"\\"), code)
    return code.replace("np.float_", "np.float64")


def without_imports(text):
    """The text, and all texts that lack some imports which follow each other."""
    lines = LINES.findall(text)
    yield text
    for first, _ in enumerate(lines):
        for last in range(first, len(lines)):
            if not re.match("(import|from) ", lines[last]):
                break
            yield "".join(lines[:first] + lines[last + 1 :])


def keeps(new, parts):
    """Whether a text begins and ends with the first and last of some parts, the others between."""
    head, *middle, tail = parts
    place = len(head)
    for part in middle:
        place = new.find(part, place) + len(part)
        if place < len(part):
            return False
    return new.startswith(head) and new.endswith(tail) and place <= len(new) - len(tail)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("form", FORMS)
def test_any_answer(form, limit):
    """Stops an answer that changes a byte outside its piece, or leaves a file that is no Python."""
    text = FORMS[form]
    pieces = cut(text, LIMITS[limit])
    rng = random.Random(f"{form} {limit}")
    changed = 0
    for _ in range(40):
        asked = rng.sample(pieces, rng.randrange(1, 7))
        given = {piece: any_answer(rng, pieces + [piece] * 30) for piece in asked}
        new, fates = settle(text, {piece: [code] for piece, code in given.items()})
        compile(new, "new", "exec")
        ends = [0, *sorted(place for piece in asked for place in (piece.start, end(piece))), None]
        parts = [text[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True)]
        assert any(keeps(candidate, parts) for candidate in without_imports(new))
        taken = [fate["line"] for fate in fates if fate["changed"]]
        assert (new != text) == bool(taken)
        changed += len(taken)
        found = [ast.dump(node) for node in ast.walk(ast.parse(new))]
        for piece, code in given.items():
            if piece.line in taken and piece.kind == "definition":
                body = ast.parse(reward.extract_code(reply(code).text)).body
                name = piece.name.split(".")[-1]
                wanted = [node for node in body if getattr(node, "name", "") == name]
                assert ast.dump(wanted[-1]) in found
    assert changed > 10


# ------------------------------------------------------------------------- one answer

METHOD = '''def first(self):
    text = """a
  b
"""
    if text:
        return np.isin(self, f"""{text
} c
""")'''


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", ["    ", "\t", " ", "        "])
def test_indentation(form, step):
    """Stops an answer whose strings are indented with its code, or code in another file's form."""
    text = FORMS[form]
    piece = named(text)["Table.Row.first"]
    code = re.sub(r"(?m)^(    )+(?=[tir])", lambda match: step * (len(match[0]) // 4), METHOD)
    new, _ = settle(text, {piece: [code]})
    unit = {"tabs": "\t", "two blanks": "  "}.get(form, "    ")
    ending = {"CRLF": "\r\n", "old Mac": "\r"}.get(form, "\n")
    if form == "mixed":
        ending = re.search("\r\n|\n", text[piece.start :])[0]
    margin = 2 * unit
    lines = [f"{margin}def first(self):", f'{margin}{unit}text = """a', "  b", '"""']
    lines += [f"{margin}{unit}if text:", f'{margin}{unit}{unit}return np.isin(self, f"""{{text']
    expected = ending.join([*lines, "} c", '""")'])
    assert new == text[: piece.start] + expected + text[end(piece) :]


CALLED = """class A:
    @staticmethod
    def f(a, /, b: np.float_, c=np.float_(1), *d, e, g=np.float_(2), **h) -> np.float_:
        return np.in1d(a, b)
    x: np.float_ = 3
    y = np.float_(4)
    async def k(self):
        def inner():
            return 1
        return inner
    if y:
        def m(self): ...
"""
CHANGES = {  # what an answer has in place of what, what is said of it
    "annotation": ("b: np.float_", "b: np.float64", ""),
    "result": ("-> np.float_:", ":", ""),
    "value of a default": ("c=np.float_(1)", "c=np.float64(1)", ""),
    "inner function": ("def inner():\n            return 1\n        return inner", "return 1", ""),
    "one more method": ("    x:", "    def new(self): ...\n    x:", ""),
    "decorator": ("    @staticmethod\n", "", "A.f has other arguments"),
    "no default": ("c=np.float_(1)", "c", "A.f has other arguments"),
    "no default of a keyword": ("g=np.float_(2)", "g", "A.f has other arguments"),
    "one more": ("*d", "*d, dtype=None", "A.f has other arguments"),
    "renamed": ("*d", "*args", "A.f has other arguments"),
    "by position": ("a, /", "a", "A.f has other arguments"),
    "by keyword": ("c=np.float_(1), *d, e", "*d, e, c=1", "A.f has other arguments"),
    "async": ("async def k", "def k", "A.k has other arguments"),
    "a method": ("async def k", "async def l", "A.k is lost"),
    "an attribute": ("    y = np.float_(4)\n    async", "    async", "A.y is lost"),
    "an annotated one": ("    x: np.float_ = 3\n", "", "A.x is lost"),
    "a conditional one": ("def m(self)", "def n(self)", "A.m is lost"),
    "the class": ("class A", "class B", "A is lost"),
    "two of it": ("class A:", "class A: pass\nclass A:\n    n = 1", ""),  # the last one counts
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_callers_see(case):
    """Stops an answer that loses a function, or that those who call it cannot call any more."""
    old, new, said = CHANGES[case]
    answer = CALLED.replace(old, new).replace("if y:", "if 1:").rstrip()
    assert answer != CALLED
    text = "import numpy as np\n" + CALLED.replace("if y:", "if 1:")
    found, [fate] = settle(text, {named(text, LIMITS["long"])["A"]: [answer]})
    assert fate["dropped"] == ({said: 1} if said else {})
    assert (found == text) == bool(said)


def test_only_what_python_sees():
    """Stops a piece that an answer repeats in another layout from being changed all the same."""
    text = "def f(a):\n    # why\n    return g( a,'x' )\n\nimport g"
    answer = 'import os\nfrom x import y\n\ndef f(a):\n    return g(a, "x")'
    new, [fate] = settle(text, {named(text)["f"]: [answer]})
    assert new == text and fate["usable"] == 1 and not fate["changed"]


IMPORTED = {  # file, new file
    "after those at the top": (
        "import os\nimport np  # why\n# x\nx = 1\ndef f(a):\n    return in1d(a)\nimport late\n",
        "import os\nimport np  # why\nNEW# x\nx = 1\ndef f(a):\n    return isin(a)\nimport late\n",
    ),
    "after the docstring": (
        '"""Doc."""\nx = 1\ndef f(a): return in1d(a)\n',
        '"""Doc."""\nNEWx = 1\ndef f(a): return isin(a)\n',
    ),
    "after __future__": (
        '# one\n"""Doc."""\nfrom __future__ import annotations\n\ndef f(a): return in1d(a)',
        '# one\n"""Doc."""\nfrom __future__ import annotations\nNEW\ndef f(a): return isin(a)',
    ),
    "after the first comments": (
        "#!/bin/python\n# License\n\n# f\ndef f(a): return in1d(a)\n",
        "#!/bin/python\n# License\nNEW\n# f\ndef f(a): return isin(a)\n",
    ),
    "at the beginning": ("def f(a): return in1d(a)\r\n", "NEWdef f(a): return isin(a)\r\n"),
    "not into if or try": (
        "import os\nif TYPE_CHECKING:\n    import np\ndef f(a): return in1d(a)\n",
        "import os\nNEWif TYPE_CHECKING:\n    import np\ndef f(a): return isin(a)\n",
    ),
    "not into a statement": (
        "import os; x = (1,\n 2)\ndef f(a): return in1d(a)\n",
        "",
    ),
    "not twice": (
        "from np import (isin,\n  x)\ndef f(a): return in1d(a)\n",
        "from np import (isin,\n  x)\ndef f(a): return isin(a)\n",
    ),
    "not in place of another": ("isin = 3\ndef f(a): return in1d(a)\n", ""),
    "nor of another import": ("from os import path as isin\ndef f(a): return in1d(a)\n", ""),
}


@pytest.mark.parametrize("case", IMPORTED)
def test_where_imports_go(case):
    """Stops imports in front of the docstring, inside a block, twice, or that change a name."""
    text, expected = IMPORTED[case]
    answer = "import sys\nfrom np import isin, array\ndef f(a):\n    return isin(a)"
    if ": return" in text:
        answer = answer.replace("\n    return", " return")
    new, _ = settle(text, {named(text)["f"]: [answer]})
    end = "\r\n" if "\r" in text else "\n"
    assert new == (expected.replace("NEW", f"from np import isin{end}") or text)


def test_imports_of_several_pieces():
    """Stops an import that two pieces bring from being added twice, or one name for two things."""
    text = "import np\ndef f(a): return np.f(a)\ndef g(a): return np.g(a)\nx = np.x"
    pieces = named(text)
    replies = {
        pieces["f"]: ["import a.b\nfrom np import y\ndef f(x): pass\n"],
        pieces["f"]: ["import a.b\nfrom np import y\ndef f(a): return y(a.b)"],
        pieces["g"]: ["from np import y\nimport a.c\ndef g(a): return y(a)"],
        pieces["line 4"]: ["from other import y\nimport np.z\nx = y"],
    }
    new, fates = settle(text, replies)
    assert new == (
        "import np\nfrom np import y\n"
        "def f(a): return y(a.b)\ndef g(a): return y(a)\nx = np.x"
    )
    assert fates[2]["dropped"] == {"y is something else in this file": 1}
    replies = {pieces["line 4"]: ["import np.z\nfrom np.q import w\n\nx = np.z.x + w"]}
    assert settle(text, replies)[0] == (
        "import np\nimport np.z\nfrom np.q import w\n" + text[10:-4] + "np.z.x + w"
    )


RENAMED = "from np import in1d, x\nimport os\ndef f(a):\n    return in1d(a)\nprint(x)\n"


def test_an_import_is_renamed_last():
    """Stops an import from being taken away from code that still needs it."""
    pieces = named(RENAMED)
    line = {pieces["line 1"]: ["from np import isin, x", "from np import isin, x"]}
    new, [fate] = settle(RENAMED, line)
    assert new == RENAMED and fate["dropped"] == {"in1d is not defined": 2}
    both = line | {pieces["f"]: ["from np import isin\ndef f(a):\n    return isin(a)"]}
    assert settle(RENAMED, both)[0] == RENAMED.replace("in1d", "isin")
    fewer = both | {pieces["line 1"]: ["from np import isin"]}
    _, [_, fate] = settle(RENAMED, fewer)
    assert fate["dropped"] == {"it imports fewer than 2 names": 1}


def test_names_that_nothing_defines():
    """Stops an answer that calls a function of its own, or one that it forgot to import."""
    text = "import np, g\ndef f(a):\n    x = a\n    return np.in1d(x, g)\n"
    piece = named(text)["f"]
    for code, missing in (
        ("def h(a): return a\ndef f(a):\n    return h(a)", "h"),
        ("def f(a):\n    return isin(a)", "isin"),
        ("def f(a):\n    return np.isin(x, g)", "x"),  # a name of the old function
        ("def f(a):\n    return [np.isin(x, g) for x in y]", "y"),
        ("def f(a):\n    return np.isin(a, g), __name__, f, len", ""),
        ("def f(a):\n    import h\n    return [h(b) for b in a]", ""),
    ):
        new, [fate] = settle(text, {piece: [code]})
        assert fate["dropped"] == ({f"{missing} is not defined": 1} if missing else {})
        assert (new == text) == bool(missing)
    star = "from np import *\n" + text
    assert settle(star, {named(star)["f"]: ["def f(a):\n    return isin(a)"]})[0] != star


def test_encoding():
    """Stops an answer with characters that the file's encoding does not have."""
    text = "x = np.in1d('a')"
    source = Source("x.py", text=text, new=text, encoding="latin-1")
    pieces = cut(text, LIMITS["long"])
    [fate] = answers.settle(source, [(pieces[0], [reply("x = '\u20ac'"), reply("x = 'é'")])])
    assert source.new == "x = 'é'" and fate["usable"] == 1


def test_the_old_code_of_the_prompt():
    """Stops a prompt without the imports that tell what a name is, or with all of the file."""
    code = {name: answers.question(piece, FILE) for name, piece in named(FILE).items()}
    assert code["line 10"] == "import numpy as np"
    assert code["one"] == (
        "import numpy as np\n\ndef one(x): return np.in1d(x, LIMIT)  # on one line"
    )
    assert code["Table.Row.first"].startswith("import numpy as np\n\ndef first(self):\n    # why\n")
    assert code["Table.size"].startswith("@size.setter\ndef size(self, value):\n    self.rows")
    assert code["load"].startswith(
        "import os\nimport numpy as np\nfrom numpy import array as make\n\n@os.cache\n@deco("
    )
    assert 'f"""\nno indentation {path}\n  two"""' in code["load"]
    assert code["line 76"].startswith("import numpy as np\n\ntry:\n    import fast\n")
    star = "from np import *\nimport os\ndef f(): return in1d"
    assert answers.question(named(star)["f"], star) == "from np import *\n\ndef f(): return in1d"


# ------------------------------------------------------------------------- files to measure with

OLD = ROOT / "tests" / "old"  # modules that run under NumPy 1.26, and what NumPy 2 says of them
CHANGED = (
    (r"np\.asfarray\((\w+)\)", r"np.asarray(\1, dtype=float)"),
    (r"np\.find_common_type\((.+), \[\]\)", r"np.result_type(*\1)"),
    (r"np\.msort\((\w+)\)", r"np.sort(\1, axis=0)"),
    (r"(\w+)\.ptp\((.*?)\)", r"np.ptp(\1, \2)"),
    (r"np\.NINF", "-np.inf"),
    (r"np\.(Inf|infty|PINF)\b", "np.inf"),
    (r"\bnp\.NaN", "np.nan"),
    (r"\bfloat_\b", "float64"),
    (r"\bunicode_", "str_"),
    (r"\bstring_", "bytes_"),
    (r"\balltrue", "all"),
    (r"\bsometrue", "any"),
    (r"\b(cum)?product", r"\1prod"),
    (r"\bround_\b", "round"),
    (r"\bin1d", "isin"),
    (r"\btrapz", "trapezoid"),
    (r"\brow_stack", "vstack"),
)


@pytest.mark.parametrize("name", ["signals", "table", "learn"])
def test_files_to_measure_with(name):
    """Stops a measurement on files that NumPy 2 runs as they are, or that no renaming mends."""
    pytest.importorskip("numpy", "2.0")
    text = (OLD / f"{name}.py").read_text()
    assert 100 <= text.count("\n") <= 400
    with pytest.raises((AttributeError, ImportError)):
        run_module(text)
    new = text
    for old, replacement in CHANGED:
        new = re.sub(old, replacement, new)
    run_module(new)
    noted = reward.words((OLD / "notes.txt").read_text())
    codes = [answers.question(piece, text) for piece in cut(text, LIMITS["some"])]
    asked = [code for code in codes if answers.identifiers(code, "numpy") & noted]
    assert 5 < len(asked) < len(codes)


def run_module(text):
    """Execute a module and its check()."""
    module = types.ModuleType("old")
    sys.modules["old"] = module  # dataclasses look there
    exec(compile(text, "old", "exec"), module.__dict__)
    module.check()
