"""migrate.py as a program: which answer is taken, what is printed about it, which model answers.

Most tests put answers into the sampler's mouth: what a small model says is beside the point.
"""

import functools
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ROWS, random_model

import data
import grpo
import migrate
import recode
import dora
from lib import loading, parallel
from lib.config import BadInput, open_policy

EXAMPLE = data.Example(**ROWS[0])
MODEL = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
OLD = "import np\nx = np.in1d(a, b)\ny = x"
NEW = "import np\nx = np.isin(a, b)\ny = x"
ZERO = {
    "answers": 1, "usable": 1, "without_code": 0, "not_parsed": 0, "cut": 0, "agreement": None,
}  # fmt: skip


def answer(code):
    return f"\nhm\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


@pytest.fixture
def say(monkeypatch, tokenizer):
    """say(texts, logps=...): what sample() returns; a text that ends in "..." was cut."""

    def start(texts, logps=None):
        rows = []
        for text in texts:
            end = [] if text.endswith("...") else [tokenizer.eos_token_id]
            rows.append(tokenizer.encode(text) + end)
        tokens = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True
        )
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        values = torch.zeros(mask.shape)
        values[:, 0] = torch.tensor([0.0] * len(rows) if logps is None else logps)
        monkeypatch.setattr(recode, "sample", lambda *args, **more: [tokens, mask, values])
        return len(texts)

    return start


def answer_with(tokenizer, n):
    return migrate.migrate(MODEL, tokenizer, EXAMPLE, n, 64)


def test_the_answer_that_the_others_agree_with(say, tokenizer):
    """Stops a choice by likelihood or by order alone: the odd one out is likely and comes first."""
    n = say([answer("import os"), answer(NEW), answer(NEW)], [-1.0, -9.0, -9.0])
    code, details = answer_with(tokenizer, n)
    assert code == NEW and details["usable"] == 3 and details["cut"] == 0
    # ab shares one of two characters with each of the others, which share none with each other
    code, details = answer_with(tokenizer, say([answer(code) for code in ("aa", "ab", "bb")]))
    assert code == "ab" and details["agreement"] == 0.5


def test_ties_go_to_the_likeliest(say, tokenizer):
    """Stops ties that the order decides, and comments that count as disagreement."""
    texts = ["no code", answer(NEW + "  # one"), answer(NEW + "  # two"), answer(NEW)]
    code, details = answer_with(tokenizer, say(texts, [-1.5, -3.0, -1.0, -2.0]))
    assert code.endswith("# two") and details["agreement"] == 1


def test_unusable_answers_are_dropped(say, tokenizer):
    """Stops code that does not parse, or none, from being taken because several samples agree."""
    broken, empty = answer("x = ("), answer("# nothing")
    n = say([broken, broken, "no code", empty, answer(NEW), "no end ..."])
    code, details = answer_with(tokenizer, n)
    assert code == NEW and details == {
        "answers": 6, "usable": 1, "without_code": 3, "not_parsed": 2, "cut": 1, "agreement": None,
    }  # fmt: skip
    code, details = answer_with(tokenizer, say([broken, "..."]))
    assert code is None and (details["usable"], details["agreement"]) == (0, None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(checkpoints, tokenizer, monkeypatch):
    """Stops a tool that is silent for minutes, and control characters in a log file."""
    model = loading.load_model(checkpoints["qwen2"])
    monkeypatch.setattr(migrate, "tqdm", functools.partial(migrate.tqdm, mininterval=0))
    shown = {}
    for stderr, term in ((Terminal(), "xterm"), (Terminal(), "dumb"), (io.StringIO(), "xterm")):
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", term)
        migrate.migrate(model, tokenizer, EXAMPLE, 3, 20)
        shown[stderr.isatty(), term] = stderr.getvalue()
    assert shown[True, "dumb"] == shown[False, "xterm"] == ""
    line = shown[True, "xterm"]
    assert "0 of at most 20 tokens" in line and "of 3 answers finished" in line
    assert line.endswith("\r")  # it is cleared


def test_progress_counts_tokens_and_rows(checkpoints):
    """Stops progress that is not reported every step, or forgets the rows that left the batch."""
    model, seen = loading.load_model(checkpoints["qwen2"]), []
    tokens, mask, _ = recode.sample(
        model, [[5, 6, 7], [8, 9]], 4, 30, list(range(8)), seed=3,
        progress=lambda token, finished: seen.append((token, finished)),
    )  # fmt: skip
    ended = (tokens < 8) & mask
    assert seen == [(t + 1, int(ended[:, : t + 1].sum())) for t in range(tokens.shape[1])]
    assert len({finished for _, finished in seen}) > 3 and seen[-1][1] > 4


# ------------------------------------------------------------------------- the file and its diff


@pytest.fixture
def program(tmp_path, monkeypatch, say, checkpoints):
    """program(content, code, *flags): the exit status of migrate.main on old.py, these bytes."""

    def run(content, code, *flags, file="old.py"):
        if content is not None:
            (tmp_path / "old.py").write_bytes(content)
        if code is not None:
            say([answer(code)] * 2)
        defaults = ["--library", "np", "--version", "2.0", "--model", checkpoints["qwen2"]]
        if not {"--update", "--update-file"} & set(flags):
            defaults += ["--update", "in1d is now isin"]
        return migrate.main([file, *defaults, *flags])

    monkeypatch.chdir(tmp_path)
    return run


TOOLS = {
    "patch": ["patch", "-p1", "--binary"],
    "git": ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn"],
}


def apply(tool, diff, place):
    """Let another program apply a diff in a directory; skip the test where it is not installed."""
    if not shutil.which(tool):
        pytest.skip(f"{tool} is the oracle")
    done = subprocess.run(TOOLS[tool], input=diff.encode(), cwd=place, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


FORMS = {  # what stands around the code, the line ending
    "plain": ("", "\n", "\n"),
    "no final newline": ("", "", "\n"),
    "CRLF": ("", "\r\n", "\r\n"),
    "CRLF, none at the end": ("", "", "\r\n"),
    "blank lines": ("\n\n", "\n\n\n", "\n"),
    "byte-order mark": ("\ufeff", "\n", "\n"),
    "form feed": ("\n\f\n", "\n\f", "\n"),
    "old Mac": ("", "\r", "\r"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("form", FORMS)
def test_what_surrounds_the_code_is_kept(program, tmp_path, capsys, form, tool):
    """Stops a diff full of line endings, or one that loses the mark, blank lines, last newline."""
    head, tail, ending = FORMS[form]
    old, new = [(head + code.replace("\n", ending) + tail).encode() for code in (OLD, NEW)]
    assert program(old, NEW) == 1 and (tmp_path / "old.py").read_bytes() == old
    diff = capsys.readouterr().out
    changed = [line.strip() for line in diff.split("\n")[2:] if line[:1] in "+-" and line]
    assert form == "old Mac" or changed == ["-x = np.in1d(a, b)", "+x = np.isin(a, b)"]
    assert program(None, NEW, "--json") == 1
    assert json.loads(capsys.readouterr().out)["code"].encode() == new
    assert program(None, OLD) == 0 and capsys.readouterr().out == ""
    apply(tool, diff, tmp_path)
    assert (tmp_path / "old.py").read_bytes() == new


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize(
    "new", [NEW, OLD + "\nz = 3", "import np\nx = '\f'\ny = x", OLD.replace("\ny = x", "")]
)
def test_other_programs_take_the_diff(program, tmp_path, capsys, tool, end, new):
    """Stops a diff that patch or git refuses, e.g. at the end of a file without a last newline."""
    assert program((OLD + end).encode(), new) == 1
    apply(tool, capsys.readouterr().out, tmp_path)
    assert (tmp_path / "old.py").read_text() == new + end


PLACES = {  # where the program is started, the file
    "from the root": ("tree", "sub/old.py"),
    "from the file's directory": ("tree/sub", "old.py"),
    "absolute path": ("tree", "{tmp}/tree/sub/old.py"),
    "from outside": ("elsewhere", "../tree/sub/old.py"),
    "through a link": ("tree", "link.py"),
}


@pytest.fixture
def tree(tmp_path):
    """tmp_path/tree with old.py twice, a link to the lower one, and a second old.py elsewhere."""
    for place in ("tree", "tree/sub", "elsewhere"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "old.py").write_text(OLD)
    (tmp_path / "tree/link.py").symlink_to("sub/old.py")
    return tmp_path / "tree"


def check_only_the_lower_file_changed(tree):
    assert (tree / "sub/old.py").read_text() == NEW
    assert (tree / "old.py").read_text() == OLD
    assert (tree / "../elsewhere/old.py").read_text() == OLD


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("place", PLACES)
def test_the_diff_lands_in_its_file(program, tree, tmp_path, monkeypatch, capsys, place, tool):
    """Stops a diff that changes the file of the same name at the root of the git work tree."""
    where, file = PLACES[place]
    (tree / ".git").mkdir()
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    monkeypatch.chdir(tmp_path / where)
    assert program(None, NEW, file=file.format(tmp=tmp_path)) == 1
    diff, err = capsys.readouterr()
    assert diff.startswith("--- a/sub/old.py\n+++ b/sub/old.py\n@@")
    assert (f"relative to {tree};" in err) == (where != "tree")
    apply(tool, diff, tree)
    check_only_the_lower_file_changed(tree)


def test_git_apply_in_the_file_s_directory(program, tree, monkeypatch, capsys):
    """Stops a diff that git, started where the file is, skips without a word."""
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    monkeypatch.chdir(tree / "sub")
    assert program(None, NEW) == 1
    apply("git", capsys.readouterr().out, tree / "sub")
    check_only_the_lower_file_changed(tree)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("file", ["sub/old.py", "{tmp}/tree/sub/old.py", "./sub/../sub/old.py"])
def test_the_diff_without_git(program, tree, tmp_path, monkeypatch, capsys, file, tool):
    """Stops a diff that names another file, or an absolute path, where there is no git."""
    monkeypatch.chdir(tree)
    assert program(None, NEW, file=file.format(tmp=tmp_path)) == 1
    diff, err = capsys.readouterr()
    assert diff.startswith("--- a/sub/old.py\n+++ b/sub/old.py\n@@") and "relative" not in err
    apply(tool, diff, tree)
    check_only_the_lower_file_changed(tree)


def test_a_file_outside(program, tree, tmp_path, monkeypatch, capsys):
    """Stops a path with .. in it, which no program applies, or a root that the user must guess."""
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program(None, NEW, file="../tree/sub/old.py") == 1
    diff, err = capsys.readouterr()
    assert diff.startswith("--- a/old.py\n+++ b/old.py\n@@")
    assert [line for line in err.split("\n") if f"relative to {tree / 'sub'};" in line]
    apply("patch", diff, tree / "sub")
    check_only_the_lower_file_changed(tree)


def test_a_git_worktree_has_a_file(program, tree, monkeypatch, capsys):
    """Stops the root from being missed in a worktree or submodule, whose .git is a file."""
    (tree / ".git").write_text("gitdir: /elsewhere\n")
    monkeypatch.chdir(tree / "sub")
    assert program(None, NEW) == 1
    assert capsys.readouterr().out.startswith("--- a/sub/old.py\n")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_name_with_blanks(program, tmp_path, capsys, tool):
    """Stops a diff whose file name ends, for patch, at the first blank."""
    (tmp_path / "my own.py").write_text(OLD)
    assert program(None, NEW, file="my own.py") == 1
    apply(tool, capsys.readouterr().out, tmp_path)
    assert (tmp_path / "my own.py").read_text() == NEW


NOTEBOOK = json.dumps({"cells": [], "metadata": {"x": None}, "nbformat": 4}, indent=1).encode()
MANY = (OLD + "\n").encode() * 800
BAD = [  # content, flags, what the message must say
    (b"x = '\xff'", [], "not UTF-8 at byte 5"),
    (b"", [], "no code"),
    (b"\n# only this\n", [], "no code"),
    (b"print 'two'", [], "does not parse"),
    (b"x = 1\0", [], "does not parse"),
    (b"x = 1\r\ny = 2\n", [], "dos2unix"),
    (b'"""\n```\n"""', [], "``` at the start"),
    (b"x = '</answer>'", [], "</answer>"),
    (NOTEBOOK, [], "a notebook"),
    (b"\xef\xbb\xbf\n" + NOTEBOOK, [], "notebook; convert"),
    (OLD.encode(), ["--update", " "], "--update: empty"),
    (OLD.encode(), ["--update-file", "none"], "none: cannot"),
    (OLD.encode(), ["--update", "a", "--update-file", "b"], "not allowed with"),
    (OLD.encode(), ["--update-file", "latin"], "latin: not UTF-8"),
    (OLD.encode(), ["--library", ""], "--library"),
    (OLD.encode(), ["--num-samples", "0"], "--num-samples"),
    (OLD.encode(), ["--temperature", "-1"], "--temperature"),
    (OLD.encode(), ["--max-prompt-tokens", "9"], "-tokens 9 at most"),
    (OLD.encode(), ["--model", "none"], "no directory"),
    (MANY, [], "no room"),
    (OLD.encode(), ["--max-new-tokens", "4090"], "no room for the answer"),
    (OLD.encode(), ["--seed", "-1"], "--seed"),
    (OLD.encode(), ["--write"], "unrecognized arguments: --write"),
]


@pytest.mark.parametrize("content, flags, word", BAD, ids=[word for *_, word in BAD])
def test_bad_input(program, tmp_path, content, flags, word):
    """Stops a traceback, or minutes of sampling, for a mistake that shows at once."""
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput) as error:
        program(content, NEW, *flags)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "old.py").read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"old.py", "latin"}


@pytest.mark.parametrize("file", ["old.ipynb", "old.txt", "old", "old.py.bak", "."])
def test_only_python_files(program, tmp_path, file):
    """Stops a diff that turns a notebook, or any other file, into Python."""
    if file != ".":
        (tmp_path / file).write_text(OLD)
    with pytest.raises(BadInput, match="not a .py or .pyi file"):
        program(None, NEW, file=file)
    (tmp_path / "stub.pyi").write_text(OLD)
    assert program(None, NEW, file="stub.pyi") == 1


def test_bad_files(program, tmp_path, monkeypatch):
    """Stops a traceback for a file that is none, or a notebook that comes from stdin."""
    with pytest.raises(BadInput, match="none.py: cannot be read: No such file"):
        program(None, NEW, file="none.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        program(None, NEW, file="folder.py")
    with pytest.raises(BadInput, match="one of the arguments --update --update-file is required"):
        migrate.main(["old.py", "--library", "np", "--version", "2"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(NOTEBOOK)))
    with pytest.raises(BadInput, match="a notebook"):
        program(None, NEW, file="-")
    about = b'KEYS = {"nbformat": 4}\nx = np.in1d(a, b)'  # code about notebooks is code
    assert program(about, about.decode()) == 0


@pytest.mark.parametrize("model", ["runs/grop", "./none", "../none", "none"])
def test_a_misspelt_model(program, tmp_path, monkeypatch, model):
    """Stops minutes of retries at the hub for a run directory whose name is misspelt."""
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(
        loading.AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("asked the hub")
    )
    with pytest.raises(BadInput) as error:
        program(OLD.encode(), NEW, "--model", model)
    assert f"model: no directory '{model}'" in str(error.value) and "\n" not in str(error.value)


def test_a_hub_id_is_no_path(program, monkeypatch):
    """Stops hub ids, which have a / too, from being refused as missing directories."""
    asked = []
    monkeypatch.setattr(
        loading.AutoTokenizer, "from_pretrained", lambda name: asked.append(name) or 1 / 0
    )
    with pytest.raises(BadInput, match="no tokenizer for 'acme/model': division by zero"):
        program(OLD.encode(), NEW, "--model", "acme/model")
    assert asked == ["acme/model"]


# ------------------------------------------------------------------------- what is printed


def test_no_usable_answer(program, tmp_path, capsys):
    """Stops an exit status that takes no answer for no change, or an error without a way out."""
    assert program(OLD.encode(), "x = (") == 3 and (tmp_path / "old.py").read_text() == OLD
    out, err = capsys.readouterr()
    assert out == "" and "no answer is usable" in err
    assert "2 that do not parse" in err and "--seed" in err


def test_json(program, capsys):
    """Stops output that another program cannot read, in all three cases."""
    for code, status in ((NEW, 1), (OLD, 0), ("x = (", 3)):
        assert program((OLD + "\n").encode(), code, "--json", "--num-samples", "2") == status
        found = json.loads(capsys.readouterr().out)
        assert found["changed"] == bool(found["diff"]) == (status == 1) and found["answers"] == 2
        assert found["code"] == (None if status == 3 else code + "\n")
        assert found["library"] == "np" and found["usable"] == (0 if status == 3 else 2)
        assert found["still_named"] == ([] if status == 1 else ["in1d"])
        assert found["lost_comments"] == found["lost_docstrings"] == []
        assert found["lost_definitions"] == []


NOTE = "np.alltrue was removed in numpy 2.0, e.g. use np.all"
CHECKED = {  # note, old code, new code, what stderr must say
    "kept": (NOTE, "np.alltrue(a)\nx = 1", "np.alltrue(a)\nx = 2", "np.alltrue"),
    "kept, equal": (NOTE, "np.alltrue(a)", "np.alltrue(a)", "np.alltrue"),
    "other alias": (NOTE, "numpy.alltrue(a)", "numpy.alltrue(a, 1)", "np.alltrue"),
    "imported": (NOTE, "from np import alltrue", "from np import alltrue, all", "np.alltrue"),
    "in an f-string": (NOTE, "print(f'{alltrue(a)}')", "print(f'{alltrue(a)} ')", "np.alltrue"),
    "module": ("old.part is gone", "import old.part", "import old.part, new", "old.part"),
    "from a module": ("old.part is gone", "from old.part import f", "import old.part", "old.part"),
    "argument": ("axis is now dim", "f(x, axis=0)", "f(x, axis=0, dim=0)", "axis"),
    "replaced": (NOTE, "np.alltrue(a)", "np.all(a)", None),
    "in a comment": (NOTE, "np.alltrue(a)", "np.all(a)  # alltrue", None),
    "in a string": (NOTE, "np.alltrue(a, 'alltrue')", "np.all(a, 'alltrue')", None),
    "replacement only": (NOTE, "np.alltrue(np.all(a))", "np.all(np.all(a))", "np.all"),
    "the library": (NOTE, "import numpy as np\nnp.alltrue(e)", "import numpy\nnumpy.all(e)", None),
    "letters": ("a or f is gone, e.g. in df", "df = f(a, g)", "df = f(a, g, 1)", None),
}


@pytest.mark.parametrize("case", CHECKED)
def test_still_named(program, capsys, case):
    """Stops an answer that all samples agree on, and that changes nothing that matters."""
    note, old, new, named = CHECKED[case]
    flags = ["--update", note, "--library", "Numpy"]
    assert program(old.encode(), new, *flags) == (old != new)
    warning = f"warning: named in the note and still in the code: {named} ("
    err = capsys.readouterr().err
    assert warning in err if named else "warning" not in err
    program(None, new, "--json", *flags)
    assert json.loads(capsys.readouterr().out)["still_named"] == ([named] if named else [])


FULL = '''#!/usr/bin/env python
"""Module."""
class A:
    "Class."
    def f(self):  # one
        """Of f,
        two lines."""
        return "# no comment"  # two
    async def g(self):
        "Of g."
    def h(self):
        pass
x = "no docstring"  # two'''


def test_lost_comments_and_docstrings(program, capsys):
    """Stops an answer that quietly drops what was written for people."""
    new = FULL.replace("  # one", "").replace("  # two\n", "\n").replace("two lines", "a line")
    assert program(FULL.encode(), new) == 1
    err = capsys.readouterr().err
    assert "warning: the new code lacks 2 comments, 1 docstring of the old code" in err
    program(None, new, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["lost_comments"] == ["# one", "# two"]
    assert found["lost_docstrings"] == ["Of f,\ntwo lines."]
    assert program(None, FULL.replace("#!/usr/bin/env python\n", "")) == 1
    assert "warning: the new code lacks 1 comment of the old code" in capsys.readouterr().err
    assert program(None, FULL.replace("    def h(self):\n        pass\n", "    z = 1\n")) == 1
    assert "lacks 1 definition (h) of the old code" in capsys.readouterr().err
    assert program(None, FULL + "\ny = 1  # more") == 1
    assert "lacks" not in capsys.readouterr().err
    bare = 'class A:\n    def f(self):  # one\n        return "# no comment"'
    assert program(None, bare) == 1
    err = capsys.readouterr().err
    assert "lacks 2 definitions (g, h), 3 comments, 4 docstrings of the old code" in err


DEFINED = """def load(path):
    return np.load(path)
async def fetch(url):
    return load(url)
class Table:
    def __init__(self):
        self.rows = load('rows')
class Row:
    def __init__(self):
        self.cells = ()"""
LOST = {  # what the new code has in its place, lost_definitions
    "function": (("def load(path):\n    return np.load(path)\n", ""), ["load"]),
    "renamed": (("def load(", "def read("), ["load"]),
    "async function": (("async def fetch(url):\n    return", "value ="), ["fetch"]),
    "no longer async": (("async def", "def"), []),
    "class": (("class Row:\n    def", "def"), ["Row"]),
    "one of two of a name": (
        ("class Row:\n    def __init__(self):", "for self in a:"),
        ["Row", "__init__"],
    ),
    "a name, no definition": (
        ("class Row:\n    def __init__(self):", "class Row:\n    if __init__:"),
        ["__init__"],
    ),
    "elsewhere": (("class Row:\n    def", "class Row:\n    pass\nclass More:\n    def"), []),
    "other arguments": (("(path)", "(path, mode='r')"), []),
    "more": (("class Row", "class New: pass\nclass Row"), []),
}


@pytest.mark.parametrize("case", LOST)
def test_lost_definitions(program, capsys, case):
    """Stops an answer that leaves out a function of the file, though its users may need it."""
    (old, new), lost = LOST[case]
    assert DEFINED.replace(old, new) != DEFINED
    assert program(DEFINED.encode(), DEFINED.replace(old, new)) == 1
    kind = "definition" if len(lost) == 1 else "definitions"
    warning = (
        f"warning: the new code lacks {len(lost)} {kind} ({', '.join(lost)}) of the old code\n"
    )
    err = capsys.readouterr().err
    assert warning in err if lost else "warning" not in err
    program(None, DEFINED.replace(old, new), "--json")
    assert json.loads(capsys.readouterr().out)["lost_definitions"] == lost


@pytest.mark.filterwarnings("error")
def test_odd_escapes(program, capsys):
    """Stops Python's warnings about the strings of a file from being printed among our own."""
    assert program(b"x = '\\d'", "x = '\\e'") == 1
    assert capsys.readouterr().err == "2 of 8 answers are usable, agreement 1.00\n"


def test_code_that_tokenize_refuses(program, capsys):
    """Stops a traceback, after minutes of sampling, for code that only Python's parser accepts."""
    code = "# one\nif x:\n\\\n    if y:\n        f(y)\n    g(y)"
    assert program(code.encode(), code) == 0
    assert program(code.encode(), OLD) == 1 and "lacks 1 comment" in capsys.readouterr().err


def test_head(tmp_path):
    """Stops a traceback where the reader of the output has seen enough: `... | head`."""
    (tmp_path / "old.py").write_text(OLD)
    command = [sys.executable, str(ROOT / "migrate.py"), "old.py", "--library", "np", "--json"]
    command += ["--version", "2", "--update", "x", "--num-samples", "1", "--max-new-tokens", "9"]
    done = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done.stdout.close()
    err = done.stderr.read()
    assert done.wait(100) in (0, 1, 3)
    assert "Traceback" not in err and "Broken" not in err and "Exception" not in err


@pytest.fixture
def asked(monkeypatch):
    """What migrate() was asked from now on, a list of (example, settings); it answers NEW."""
    seen = []

    def migrate_seen(model, tokenizer, example, *settings):
        seen.append((example, settings))
        return NEW, ZERO

    monkeypatch.setattr(migrate, "migrate", migrate_seen)
    return seen


def test_greedy_is_one_answer(program, asked, capsys):
    """Stops eight equal answers from passing for agreement, and settings from getting lost."""
    flags = ["--max-new-tokens", "7"]
    assert program(OLD.encode(), None, "--temperature", "0", "--seed", "3", *flags) == 1
    assert program(OLD.encode(), None, "--num-samples", "5", *flags) == 1
    assert [settings for _, settings in asked] == [(1, 7, 0.0, 3), (5, 7, 0.8, 42)]
    assert "agreement" not in capsys.readouterr().err


def test_room_for_the_answer(program, asked, tokenizer):
    """Stops an answer from being cut because the file is longer than those of the training."""
    long, longer = ("\n".join(f"x = lib.call_{i}(a)" for i in range(count)) for count in (60, 99))
    for content in (OLD, long, longer):
        assert program(content.encode(), None) == 1
    example = data.Example("np", "2.0", "", "in1d is now isin", longer, "")
    left = 4096 - len(data.encode_prompt(example, tokenizer))
    limits = [settings[1] for _, settings in asked]
    assert limits == [1024, 2 * len(tokenizer.encode(long)), left]
    tokens = len(tokenizer.encode(longer))
    assert limits[1] > 1024 and tokens < limits[2] < 2 * tokens


def test_stdin_and_notes_from_a_file(program, asked, tmp_path, monkeypatch, capsys):
    """Stops notes or code from getting lost on their way into the prompt, that of training."""
    mixed = (OLD + "\r\n").replace("\n", "\r\n").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mixed)))
    (tmp_path / "notes").write_bytes(b"\xef\xbb\xbf\r\nin1d is gone.\r\nUse isin.\r\n")
    with pytest.raises(BadInput, match="mixes"):
        program(None, None, "--update-file", "notes", file="-")
    content = (OLD + "\n").replace("\n", "\r\n").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    flags = ["--update-file", "notes", "--version", "==2.1"]
    assert program(None, None, *flags, file="-") == 1
    expected = data.Example("np", "2.1", "", "in1d is gone.\nUse isin.", OLD, "")
    assert [example for example, _ in asked] == [expected]
    assert "--- a/stdin\n+++ b/stdin\n" in capsys.readouterr().out


# ------------------------------------------------------------------------- the model


@pytest.fixture
def trained(tmp_path, tokenizer, monkeypatch):
    """A run directory project/runs/one with an adapter that is not zero; its base is "base"."""
    project = tmp_path / "project"
    model = random_model("qwen2", len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(project / "base")
    tokenizer.save_pretrained(project / "base")
    settings = {"model": "base", "output": "runs/one", "max_new_tokens": 7}
    config = grpo.Config(**settings, r=4, alpha=8.0, dropout=0.0)
    dora.add_dora(model, 4, 8.0, 0.0, "q_proj,v_proj")
    with torch.no_grad():
        for layer in dora.dora_layers(model).values():
            layer.lora_B.normal_(std=0.5)
    dora.save_adapter(model, config, project / "runs/one/adapter")
    settings = vars(config) | {"began_in": "../.."}
    (project / "runs/one/config.json").write_text(json.dumps(settings))
    return project / "runs/one", model


@pytest.mark.parametrize("place", [".", "project", "project/runs/one"])
def test_run_directory(trained, tmp_path, monkeypatch, place):
    """Stops the untrained base from answering, and a run only found from where it was started."""
    path, model = trained
    monkeypatch.chdir(tmp_path / place)
    (tmp_path / "base").mkdir()  # another project's
    base, adapter, settings = open_policy(os.path.relpath(path))
    assert settings["max_new_tokens"] == 7
    ids = torch.arange(5, 15)[None]
    logits = model.eval()(ids).logits
    torch.testing.assert_close(loading.load_policy(base, adapter)(ids).logits, logits)
    assert not torch.allclose(loading.load_policy(base, "")(ids).logits, logits)


def test_full_model_of_a_run(trained):
    """Stops a fully trained run, without adapter, from passing for one without tokenizer."""
    path, _ = trained
    shutil.rmtree(path / "adapter")
    shutil.move(path.parent.parent / "base", path / "model")
    base, adapter, _ = open_policy(str(path))
    assert (base, adapter) == (str(path / "model"), "") and loading.load_tokenizer(base)
    assert open_policy("acme/model") == ("acme/model", "", {})
    assert open_policy(str(ROOT / "tiny"))[2]["max_new_tokens"] == 64


def test_an_adapter_of_another_model(trained, checkpoints):
    """Stops a traceback where the base has been replaced since, or the adapter is damaged."""
    path, _ = trained
    with pytest.raises(BadInput, match="does not fit"):
        loading.load_policy(str(ROOT / "tiny"), str(path / "adapter"))
    weights = path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadInput, match="weights missing or damaged"):
        loading.load_policy(checkpoints["qwen2"], str(path / "adapter"))


def test_as_a_program(tmp_path, monkeypatch, capsys):
    """Stops a first try without --model that does not say who answers, or a traceback."""
    row = json.loads((ROOT / "tiny" / "heldout.jsonl").read_text().splitlines()[3])
    (tmp_path / "old.py").write_text(row["old_code"] + "\n")
    command = [sys.executable, str(ROOT / "migrate.py"), "old.py", "--num-samples", "2"]
    command += ["--library", row["dependency"], "--version", row["new_version"]]
    command += ["--update", row["update_info"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, 1, 3)
    assert "toy answers, which knows made-up libraries only" in done.stderr
    assert "Traceback" not in done.stderr and bool(done.stdout) == (done.returncode == 1)
    monkeypatch.setattr(sys, "argv", [*command[1:], "--nothing"])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(migrate.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
