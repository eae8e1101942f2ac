"""migrate.py as a program: what is asked, which answer is taken, what is printed about it.

Most tests put answers into the sampler's mouth: what a small model says is beside the point. What
becomes of an answer that does not fit its piece is in test_pieces.py.
"""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ROWS, random_model

import data
import dora
import grpo
import migrate
import recode
import rollout
from lib import loading, parallel, sources
from lib.config import BadInput, open_policy
from lib.pieces import cut
from tasks import answers

EXAMPLE = data.Example(**ROWS[0])
OLD = "import np\nx = np.in1d(a, b)\ny = x"
NEW = "import np\nx = np.isin(a, b)\ny = x"


def answer(code):
    return f"\nhm\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


def choose(codes, logps=None):
    """answers.choose() among the code of some answers."""
    logps = logps or [0.0] * len(codes)
    usable = [((code, {}), logp) for code, logp in zip(codes, logps, strict=True)]
    (code, _), agreement = answers.choose(usable)
    return code, agreement


def test_the_answer_that_the_others_agree_with():
    """Stops a choice by likelihood or by order alone: the odd one out is likely and comes first."""
    assert choose(["import os", NEW, NEW], [-1.0, -9.0, -9.0])[0] == NEW
    # ab shares one of two characters with each of the others, which share none with each other
    assert choose(["aa", "ab", "bb"]) == ("ab", 0.5)
    assert choose([NEW]) == (NEW, None)


def test_ties_go_to_the_likeliest():
    """Stops ties that the order decides, and comments that count as disagreement."""
    code, agreement = choose([NEW + "  # one", NEW + "  # two", NEW], [-3.0, -1.0, -2.0])
    assert code.endswith("# two") and agreement == 1


def test_unusable_answers_are_dropped():
    """Stops code that does not parse, or none, from being taken because several samples agree."""
    broken, empty = answer("x = ("), answer("# nothing")
    texts = [broken, broken, "no code", empty, "no end ...", answer(NEW)]
    given = [rollout.Answer([], text, text.endswith("..."), 0.0) for text in texts]
    source = sources.Source("old.py", text=OLD)
    _, piece = cut(OLD)
    dropped = {"'(' was never closed": 2, "it has no code": 2, "it was cut": 1}
    [fate] = answers.settle(source, [(piece, given)])
    assert source.new == NEW and fate == {
        "name": "line 2", "line": 2, "changed": True, "agreement": None,
        "answers": 6, "usable": 1, "dropped": dropped,
    }  # fmt: skip
    [fate] = answers.settle(source, [(piece, given[:-1])])
    assert source.new == OLD and (fate["usable"], fate["agreement"]) == (0, None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(checkpoints, tokenizer, monkeypatch):
    """Stops a tool that is silent for minutes, and control characters in a log file."""
    model = loading.load_model(checkpoints["qwen2"])
    monkeypatch.setattr(migrate, "tqdm", functools.partial(migrate.tqdm, mininterval=0))
    args = SimpleNamespace(num_samples=3, temperature=0.8, seed=0)
    prompt = data.encode_prompt(EXAMPLE, tokenizer)
    shown = {}
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        tasks = [migrate.Task(None, None, "", prompt, limit=20) for _ in range(2)]
        migrate.sample(model, tokenizer, tasks, args)
        assert [len(task.answers) for task in tasks] == [3, 3]
        shown[stderr.isatty()] = stderr.getvalue()
    assert shown[False] == ""
    line = shown[True]
    assert "0/2 [" in line and "2/2 [" in line and "piece" in line
    assert "token 1 of 20" in line and "of 6 answers finished" in line
    assert line.endswith("\r")  # it is cleared


def test_batches(monkeypatch, tokenizer):
    """Stops a batch for each piece, a batch that is larger than memory, answers of another piece,
    and answers that depend on what else is asked.
    """
    seen = []

    def sample_answers(model, tokenizer, prompts, n, limit, temperature, seeds, progress):
        seen.append((len(prompts), limit, seeds))
        return [(prompt, i) for prompt in prompts for i in range(n)]

    monkeypatch.setattr(rollout, "sample_answers", sample_answers)
    monkeypatch.setattr(migrate, "BATCH", 2 * 3 * 100)
    args = SimpleNamespace(num_samples=3, temperature=0.8, seed=7)
    lengths = [(10, 20, 99), (40, 60, 99), (50, 500, 600), (20, 30, 25), (30, 60, 55), (8, 20, 99)]
    tasks = [migrate.Task(None, None, "", "x" * prompt, *rest) for prompt, *rest in lengths]
    migrate.sample(None, tokenizer, tasks, args)
    assert seen == [(1, 500, [7]), (2, 55, [7] * 2), (3, 25, [7] * 3)]  # as much as there is room
    assert all(task.answers == [(task.prompt, i) for i in range(3)] for task in tasks)


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
def stub(monkeypatch, tokenizer):
    """A stub in place of the model: says(old code) is the code of its answers."""
    seen = SimpleNamespace(says=None, asked=[], settings=[], batches=0, loads=0)

    def load_policy(*args):
        seen.loads += 1
        return SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096))

    def sample_answers(model, tokenizer, prompts, n, limit, temperature, seeds, progress):
        seen.batches += 1
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            code = re.search("```python\n(.*?)\n```\n", tokenizer.decode(prompt), re.DOTALL)[1]
            seen.asked.append(code)
            seen.settings.append((n, limit, temperature, seed))
            found += [rollout.Answer([], answer(seen.says(code)), False, 0.0)] * n
        return found

    monkeypatch.setattr(loading, "load_policy", load_policy)
    monkeypatch.setattr(migrate.setup, "check_policy", lambda *args: None)
    monkeypatch.setattr(rollout, "sample_answers", sample_answers)
    return seen


@pytest.fixture
def program(tmp_path, monkeypatch, stub, checkpoints):
    """program(content, code, *flags): the exit status of migrate.main on old.py, these bytes.

    code: that of all answers, or a function of the old code.
    """

    def run(content, code, *flags, file="old.py"):
        if content is not None:
            (tmp_path / "old.py").write_bytes(content)
        stub.says = code if callable(code) else lambda old: code
        defaults = ["--library", "np", "--version", "2.0", "--model", checkpoints["qwen2"]]
        if not {"--update", "--update-file"} & set(flags):
            defaults += ["--update", "in1d is now isin"]
        return migrate.main([*file.split(" & "), *defaults, *flags])

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
    diff = diff.encode() if isinstance(diff, str) else diff
    done = subprocess.run(TOOLS[tool], input=diff, cwd=place, capture_output=True)
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
    found = json.loads(capsys.readouterr().out)
    assert found["code"].encode(found["encoding"]) == new
    assert program(None, OLD) == 0 and capsys.readouterr().out == ""
    apply(tool, diff, tmp_path)
    assert (tmp_path / "old.py").read_bytes() == new


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize(
    "new", [NEW, OLD + "\nz = 3", "import np\nx = '\f'\ny = x", "import np\ny = x = 'é\u2028'"]
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
BAD_FLAGS = [  # flags, what the message must say
    (["--update", " "], "--update: empty"),
    (["--update-file", "none"], "none: cannot"),
    (["--update", "a", "--update-file", "b"], "not allowed with"),
    (["--update-file", "latin"], "latin: not UTF-8"),
    (["--library", ""], "--library"),
    (["--num-samples", "0"], "--num-samples"),
    (["--temperature", "-1"], "--temperature"),
    (["--model", "none"], "no directory"),
    (["--seed", "-1"], "--seed"),
    (["--wrote"], "unrecognized arguments: --wrote"),
]


@pytest.mark.parametrize("flags, word", BAD_FLAGS, ids=[word for *_, word in BAD_FLAGS])
def test_bad_flags(program, tmp_path, flags, word):
    """Stops a traceback, or minutes of sampling, for a mistake that shows at once."""
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput) as error:
        program(OLD.encode(), NEW, *flags)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "old.py").read_bytes() == OLD.encode()
    assert {path.name for path in tmp_path.iterdir()} == {"old.py", "latin"}


LONG = b"def f(a):\n" + b"    x = np.in1d(a, 1)\n" * 2500
MANY = (OLD + "\n").encode() * 800
WHOLE = ["--max-piece-tokens", "0"]
BAD = [  # content, flags, what the message must say
    (b"x = '\xff'", [], "save it as UTF-8"),
    (b"\n\n\nx = '\xff'", [], "in position 8: invalid start byte; fix it, or save it"),
    (b"# coding: latin-2\n# coding: none\nx = '\xff'\n".replace(b"latin-2", b"no"), [], "unknown"),
    (b"# coding: rot13\nk = 1", [], "save it as UTF-8"),
    (b"# coding: utf-7\nx = '+AOk-'", [], "the same bytes again"),
    (OLD.encode("utf-16"), [], "save it as UTF-8"),
    (b"print 'two'", [], "invalid in Python 3."),
    (b"x = 1\0", [], "null bytes"),
    (b"x = 1\nreturn x", [], "'return' outside function"),
    (b"x = " + b"-" * 5000 + b"1", [], "invalid in Python"),
    (NOTEBOOK, [], "a notebook"),
    (b"\xef\xbb\xbf\n" + NOTEBOOK, [], "notebook; convert"),
    (b'in1d = """\n```\n"""', [], "old.py: line 1: has </answer> or ``` at the start"),
    (b"in1d = '</answer>'", [], "old.py: line 1: has </answer>"),
    (MANY, WHOLE, "the file: "),
    (MANY, WHOLE, "no room"),
    (LONG, [], "old.py: f: has 55,009 characters, and an answer at most 50,000; left alone"),
]


@pytest.mark.parametrize("content, flags, word", BAD)
def test_bad_input(program, stub, tmp_path, capsys, content, flags, word):
    """Stops a traceback, or minutes of sampling, for a file that cannot be migrated; and a patch
    that empties it.
    """
    assert program(content, NEW, *flags, "--write", "--force") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: old.py: ") and err.count("\n") == 1 and word in err
    assert program(None, NEW, *flags) == 2
    assert capsys.readouterr().out == "" and stub.asked == []
    assert (tmp_path / "old.py").read_bytes() == content


@pytest.mark.parametrize("file", ["old.ipynb", "old.txt", "old", "old.py.bak"])
def test_only_python_files(program, tmp_path, capsys, file):
    """Stops a diff that turns a notebook, or any other file, into Python."""
    (tmp_path / file).write_text(OLD)
    assert program(None, NEW, file=file) == 2
    assert f"error: {file}: not a .py or .pyi file" in capsys.readouterr().err
    (tmp_path / "stub.pyi").write_text(OLD)
    assert program(None, NEW, file="stub.pyi") == 1


def test_bad_files(program, tmp_path, monkeypatch, capsys):
    """Stops a traceback for a file that is none, or a notebook that comes from stdin."""
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "bad.py").write_text(OLD)
    read = sources.Path.read_bytes

    def deny(path):
        if path.name == "bad.py":  # root may read everything
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(sources.Path, "read_bytes", deny)
    files = "none.py & loop.py & folder.py & bad.py & line\nbreak.py & old.py"
    assert program(OLD.encode(), NEW, file=files) == 2
    out, err = capsys.readouterr()
    assert "error: none.py: cannot be read: No such file" in err
    assert "error: loop.py: cannot be read: Too many levels of symbolic links\n" in err
    assert "error: folder.py: cannot be read: Is a directory\n" in err
    assert "error: bad.py: cannot be read: Permission denied\n" in err
    assert "error: 'line\\nbreak.py': a patch cannot hold this name; rename" in err
    assert err.splitlines()[-1] == "6 files: 1 changed, 5 with errors"
    assert out.count("+++") == 1 and "+++ b/old.py\n" in out
    with pytest.raises(BadInput, match="one of the arguments --update --update-file is required"):
        migrate.main(["old.py", "--library", "np", "--version", "2"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(NOTEBOOK)))
    assert program(None, NEW, file="-") == 2 and "-: a notebook" in capsys.readouterr().err
    about = b'KEYS = {"nbformat": 4}\nx = np.in1d(a, b)'  # code about notebooks is code
    assert program(about, about.decode()) == 0


ENCODED = [  # encoding, first line
    ("latin-1", "# -*- coding: latin-1 -*-\n"),
    ("cp1252", "#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\n"),
    ("shift_jis", "# coding: shift_jis\n"),
    ("utf-8-sig", "# coding: utf-8\n"),
]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("encoding, head", ENCODED, ids=[encoding for encoding, _ in ENCODED])
def test_other_encodings(program, tmp_path, capfdbinary, encoding, head, tool):
    """Stops a patch in another encoding than the file, and a file that loses its cookie."""
    word = "\u65e5\u672c" if encoding == "shift_jis" else "caf\u00e9"
    text = f"{head}x = np.in1d(a, '{word}')\n# {word}\n"
    new = text.replace("in1d", "isin")
    assert program(text.encode(encoding), f"x = np.isin(a, '{word}')") == 1
    apply(tool, capfdbinary.readouterr().out, tmp_path)
    assert (tmp_path / "old.py").read_bytes() == new.encode(encoding)
    assert program(text.encode(encoding), "x = '\U0001f600'") == (1 if "utf" in encoding else 3)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_the_terminal_s_encoding(program, tmp_path, encoding):
    """Stops a traceback, or a patch that does not apply, where stdout is not UTF-8."""
    out = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(out, encoding=encoding)) as shown:
        assert program("x = np.in1d('é')\n".encode(), "x = np.isin('é\u65e5')") == 1
        shown.flush()
        assert out.getvalue().endswith("\n-x = np.in1d('é')\n+x = np.isin('é\u65e5')\n".encode())
        assert program(None, "x = np.isin('é')", "--json") == 1
        shown.flush()


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
    assert "8 refused, as '(' was never closed" in err and "--seed" in err


def test_json(program, capsys):
    """Stops output that another program cannot read, in all three cases."""
    for code, status in ((NEW, 1), (OLD, 0), ("x = (", 3)):
        assert program((OLD + "\n").encode(), code, "--json", "--num-samples", "2") == status
        found = json.loads(capsys.readouterr().out)
        [piece] = found["pieces"]
        assert found["changed"] == bool(found["diff"]) == piece["changed"] == (status == 1)
        assert found["code"] == (NEW if status == 1 else OLD) + "\n"
        assert (piece["name"], piece["line"], piece["answers"]) == ("line 2", 2, 2)
        assert piece["usable"] == (0 if status == 3 else 2)
        assert piece["dropped"] == ({"'(' was never closed": 2} if status == 3 else {})
        assert found["still_named"] == ([] if status == 1 else ["in1d"])
        assert found["errors"] == []
        assert (found["file"], found["path"]) == ("old.py", "old.py")


NOTE = "np.alltrue was removed in numpy 2.0, e.g. use np.all"
CHECKED = {  # note, old code, new code, what stderr must say
    "kept": (NOTE, "np.alltrue(a)\nx = 1", "np.alltrue(a)\nx = 2", "alltrue"),
    "kept, equal": (NOTE, "np.alltrue(a)", "np.alltrue(a)", "alltrue"),
    "other alias": (NOTE, "numpy.alltrue(a)", "numpy.alltrue(a, 1)", "alltrue"),
    "imported": (NOTE, "from np import alltrue", "from np import alltrue, all", "alltrue"),
    "in an f-string": (NOTE, "print(f'{alltrue(a)}')", "print(f'{alltrue(a)} ')", "alltrue"),
    "module": ("old.part is gone", "import old.part", "import old.part, new", "old, part"),
    "from a module": ("old.part is gone", "from old.part import f", "import old.part", "old, part"),
    "argument": ("axis is now dim", "f(x, axis=0)", "f(x, axis=0, dim=0)", "axis"),
    "replaced": (NOTE, "np.alltrue(a)", "np.all(a)", None),
    "in a comment": (NOTE, "np.alltrue(a)", "np.all(a)  # alltrue", None),
    "in a string": (NOTE, "np.alltrue(a, 'alltrue')", "np.all(a, 'alltrue')", None),
    "replacement only": (NOTE, "np.alltrue(np.all(a))", "np.all(np.all(a))", "all"),
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
    found = json.loads(capsys.readouterr().out)["still_named"]
    assert found == (named.split(", ") if named else [])


@pytest.mark.filterwarnings("error")
def test_odd_escapes(program, capsys):
    """Stops Python's warnings about the strings of a file from being printed among our own."""
    assert program(b"in1d = '\\d'", "in1d = '\\e'") == 1
    assert capsys.readouterr().err == (
        "old.py: 1 of 1 pieces changed, lowest agreement 1.00\n"
        "old.py: warning: named in the note and still in the code: in1d (fine if meant to stay)\n"
    )


def test_code_that_tokenize_refuses(program, capsys):
    """Stops a traceback, after minutes of sampling, for code that only Python's parser accepts."""
    code = "# one\nif x:\n\\\n    if y:\n        np.in1d(y)\n    g(y)"
    assert program(code.encode(), code) == 0
    assert program(code.encode(), rename) == 1
    odd = "def f(self):\n" + re.sub("(?m)^(?!\\\\)", "    ", code)
    method = "class A:\n    def f(self):\n        np.in1d(x)\n"
    assert program(method.encode(), odd, "--max-piece-tokens", "1") == 3
    assert "no answer is usable: 8 refused" in capsys.readouterr().err


@pytest.mark.slow
def test_head(tmp_path):
    """Stops a traceback where the reader of the output has seen enough: `... | head`."""
    (tmp_path / "old.py").write_text("x = 1\n")
    command = [sys.executable, str(ROOT / "migrate.py"), "old.py", "--library", "np", "--json"]
    command += ["--version", "2", "--update", "x", "--num-samples", "1", "--max-new-tokens", "9"]
    done = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done.stdout.close()
    err = done.stderr.read()
    assert done.wait(100) in (0, 1, 3)
    assert "Traceback" not in err and "Broken" not in err and "Exception" not in err


# ------------------------------------------------------------------------- what is asked

MODULE = '''"""A module about in1d."""
import os
import numpy as np
from numpy import in1d as member


def first(a, b):
    return np.in1d(a, b)


def second(a):
    return np.unique(a), "in1d"  # in1d


class Table:
    """Rows."""

    def find(self, key):
        """Find it."""
        return member(self.rows, key)

    def size(self):
        return len(self.rows)
'''


def rename(code):
    return code.replace("in1d", "isin")


def test_only_what_the_notes_name_is_asked(program, stub, capsys):
    """Stops a model from being asked for code that the notes do not name, or not for code that
    names it by another name; the library's own names are in every note.
    """
    flags = ["--library", "numpy", "--update", "numpy: np.in1d was removed; use np.isin for it"]
    assert program(MODULE.encode(), rename, *flags, "--max-piece-tokens", "1") == 1
    assert sorted(stub.asked) == [
        "from numpy import in1d as member",
        "from numpy import in1d as member\n\ndef find(self, key):\n"
        '    """Find it."""\n    return member(self.rows, key)',
        "import numpy as np\n\ndef first(a, b):\n    return np.in1d(a, b)",
    ]
    patch = capsys.readouterr().out
    changed = [line for line in patch.splitlines()[2:] if line[:1] in "+-"]
    assert changed == [
        "-from numpy import in1d as member", "+from numpy import isin as member",
        "-    return np.in1d(a, b)", "+    return np.isin(a, b)",
    ]  # fmt: skip


def test_nothing_to_ask(program, stub, tmp_path, capsys):
    """Stops minutes of loading and sampling for files that the notes do not concern."""
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "comment.py").write_text("# in1d\n")
    files = "old.py & empty.py & comment.py"
    assert program(b"x = np.isin_all(a)\n", rename, file=files) == 0
    assert stub.loads == 0 and stub.asked == []
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        *[f"{name}: names nothing of the notes, left alone" for name in files.split(" & ")],
        "3 files: 0 changed, 0 with errors",
    ]  # fmt: skip
    assert program(None, rename, "--all", file=files) == 0
    assert stub.loads == 1 and stub.asked == ["x = np.isin_all(a)"]


def test_whole_files(program, stub):
    """Stops --max-piece-tokens 0 from cutting a file; it is what pieces are compared with."""
    assert program(MODULE.encode(), rename, *WHOLE) == 1
    assert stub.asked == [MODULE.strip()]


def test_long_classes_are_cut(program, stub):
    """Stops a class that is much longer than what models were trained on from being one piece."""
    method = "    def f{}(self):\n        return np.in1d(self.x, {})\n"
    for count, pieces in ((3, 1), (40, 40)):
        content = "class A:\n" + "".join(method.format(i, i) for i in range(count))
        stub.asked = []
        assert program(content.encode(), rename) == 1 and len(stub.asked) == pieces


def test_a_long_file(program, stub, tmp_path):
    """Stops a file from being refused, or each answer to it, because it is longer than an answer
    may be.
    """
    text = "".join(f"def f{i}(a):\n    return g(a, '{'x' * 2000}')\n" for i in range(30))
    text = f"import np\n{text}def last(a):\n    return np.in1d(a, a)\n"
    assert len(text) > 60_000
    assert program(text.encode(), rename) == 1
    assert stub.asked == ["import np\n\ndef last(a):\n    return np.in1d(a, a)"]


def test_many_files(program, stub, tmp_path, monkeypatch, capsys):
    """Stops a model that is loaded for each file, batches of one piece, links that lead out or
    round, folders of other people's code, and one fault that costs the other files.
    """
    for tool in TOOLS:
        if not shutil.which(tool):
            pytest.skip(f"{tool} is the oracle")
    texts = {
        "src/b.py": OLD, "src/a/c.py": OLD + "\n", "src/a/d.pyi": "def in1d(a): ...\n",
        "src/.git/x.py": OLD, "src/.venv/x.py": OLD, "src/venv/x.py": OLD,
        "src/__pycache__/x.py": OLD, "src/a/node_modules/x.py": OLD, "src/notes.txt": OLD,
        "src/bad.py": "print 'x'", "src/__init__.py": "", "other/e.py": OLD, "alone.py": OLD,
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "src/loop").symlink_to("../src")
    (tmp_path / "src/out.py").symlink_to("../other/e.py")
    os.mkfifo(tmp_path / "src/pipe.py")
    (tmp_path / "none").mkdir()
    files = "src & alone.py & none & ./alone.py & src/b.py"
    assert program(None, rename, file=files) == 2
    assert stub.loads == stub.batches == 1 and len(stub.asked) == 4
    out, err = capsys.readouterr()
    changed = ["src/a/c.py", "src/b.py", "alone.py"]
    assert re.findall(r"(?m)^\+\+\+ b/(.*)", out) == changed
    lines = err.splitlines()
    assert lines[:2] == [
        "src/__init__.py: names nothing of the notes, left alone",
        "src/a/c.py: 1 of 1 pieces changed, lowest agreement 1.00",
    ]
    assert "in1d: no answer is usable: 8 refused, as in1d is lost; try" in lines[3]
    assert "error: src/bad.py: invalid in Python" in err
    assert "error: none: not a .py or .pyi file, nor a directory with some; other" in err
    assert lines[-1] == "7 files: 3 changed, 2 with errors"
    for tool in TOOLS:
        place = tmp_path / tool
        for name, text in texts.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        apply(tool, out, place)
        for name, text in texts.items():
            assert (place / name).read_text() == (rename(text) if name in changed else text)


def test_many_files_as_json(program, tmp_path, capsys):
    """Stops output that is neither one object a line nor complete where a file is at fault."""
    (tmp_path / "bad.py").write_text("print 'x'")
    assert program(OLD.encode(), NEW, "--json", file="bad.py & old.py & none.py") == 2
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["file"] for each in found] == ["bad.py", "old.py", "none.py"]
    assert [each["changed"] for each in found] == [False, True, False]
    assert [len(each["errors"]) for each in found] == [1, 0, 1]
    assert {tuple(sorted(each)) for each in found} == {tuple(sorted(found[1]))}


STATUS = {  # code of a.py, code of b.py, exit status
    "one changed": ("isin", "in1d", 1),
    "one changed, one without answer": ("isin", "(", 1),
    "none changed": ("in1d", "in1d", 0),
    "one without answer": ("in1d", "(", 3),
    "none with": ("(", "(", 3),
}


@pytest.mark.parametrize("case", STATUS)
def test_status_of_many(program, tmp_path, case):
    """Stops a script from taking a file without answer for one that needs no change."""
    first, second, status = STATUS[case]
    (tmp_path / "a.py").write_text("a = np.in1d")
    (tmp_path / "b.py").write_text("b = np.in1d")

    def says(code):
        return code.replace("in1d", first if code.startswith("a") else second)

    assert program(None, says, file="a.py & b.py") == status


# ------------------------------------------------------------------------- --write


@pytest.fixture
def work_tree(tmp_path):
    """A git work tree with two committed files, one of them executable, below sub."""
    if not shutil.which("git"):
        pytest.skip("git says what is clean")
    (tmp_path / "sub").mkdir()
    for name in ("old.py", "sub/run.py", "sub/other.py"):
        (tmp_path / name).write_text(OLD.replace("in1d", "other" if "other" in name else "in1d"))
    (tmp_path / "sub/run.py").chmod(0o751)
    identity = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)
    return tmp_path


def test_write(program, work_tree, capsys):
    """Stops a file that is written in part or loses its permissions, or a patch on top of it."""
    (work_tree / "sub/link.py").symlink_to("run.py")
    assert program(None, rename, "--write", file="old.py & sub/link.py") == 1
    assert capsys.readouterr().out == ""
    for name in ("old.py", "sub/run.py"):
        assert (work_tree / name).read_text() == NEW
    assert stat.S_IMODE((work_tree / "sub/run.py").stat().st_mode) == 0o751
    assert (work_tree / "sub/link.py").is_symlink()
    left = {path.name for path in (work_tree / "sub").iterdir()}
    assert left == {"run.py", "link.py", "other.py"}


def test_write_asks_git(program, stub, work_tree, tmp_path, monkeypatch, capsys):
    """Stops work from being lost that git does not have: changed, new or ignored files."""
    (work_tree / "sub/run.py").write_text(OLD + "\nz = 1")
    (work_tree / "sub/new.py").write_text(OLD)
    (work_tree / "sub/hidden.py").write_text(OLD)
    (work_tree / "sub/other.py").write_text("dirty = 'but names nothing'")
    (work_tree / ".gitignore").write_text("hidden.py\n")
    assert program(None, rename, "--write", file="sub & old.py") == 2
    err = capsys.readouterr().err
    for name in ("run", "new", "hidden"):
        assert f"error: --write: sub/{name}.py is not in git as it is (" in err
        assert "np.in1d" in (work_tree / f"sub/{name}.py").read_text()
    assert len(stub.asked) == 1 and (work_tree / "old.py").read_text() == NEW
    assert program(None, rename, "--write", "--force", file="sub") == 1
    assert "np.isin" in (work_tree / "sub/hidden.py").read_text()
    shutil.rmtree(work_tree / ".git")
    (work_tree / "old.py").write_text(OLD)
    assert program(None, rename, "--write") == 2
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert program(None, rename, "--write") == 2
    assert "No such file or directory: 'git'" in capsys.readouterr().err
    assert (work_tree / "old.py").read_text() == OLD


def test_write_what_has_changed_meanwhile(program, tmp_path, capsys):
    """Stops an edit made while the model answers from being lost; and a file that vanishes."""

    def edit(code):
        (tmp_path / "old.py").write_text("x = 'mine'")
        (tmp_path / "gone.py").unlink(missing_ok=True)
        return rename(code)

    (tmp_path / "gone.py").write_text("x = np.in1d")
    flags = ["--write", "--force"]
    assert program(OLD.encode(), edit, *flags, file="old.py & gone.py") == 2
    assert (tmp_path / "old.py").read_text() == "x = 'mine'"
    err = capsys.readouterr().err
    assert "error: old.py: changed since it was read; left alone\n" in err
    assert "error: gone.py: cannot be read: No such file" in err
    assert program(OLD.encode(), NEW, "--write", file="-") == 2


# ------------------------------------------------------------------------- settings


def test_greedy_is_one_answer(program, stub, capsys):
    """Stops eight equal answers from passing for agreement, and settings from getting lost."""
    flags = ["--max-new-tokens", "7"]
    assert program(OLD.encode(), NEW, "--temperature", "0", "--seed", "3", *flags) == 1
    assert "agreement" not in capsys.readouterr().err
    assert program(OLD.encode(), NEW, "--num-samples", "5", *flags) == 1
    assert stub.settings == [(1, 7, 0.0, 3), (5, 7, 0.8, 42)]


def test_room_for_the_answer(program, stub, tokenizer):
    """Stops an answer from being cut because the file is longer than those of the training."""
    long, longer = ("\n".join(f"x = lib.in1d_{i}(a)" for i in range(count)) for count in (60, 99))
    for content in (OLD, long, longer):
        assert program(content.encode(), rename, "--update", "x", *WHOLE) in (0, 1)
    example = data.Example("np", "2.0", "", "x", longer, "")
    left = 4096 - len(data.encode_prompt(example, tokenizer))
    limits = [settings[1] for settings in stub.settings]
    assert limits == [1024, 2 * len(tokenizer.encode(long)), left]
    tokens = len(tokenizer.encode(longer))
    assert limits[1] > 1024 and tokens < limits[2] < 2 * tokens


def test_stdin_and_notes_from_a_file(program, monkeypatch, tmp_path, capfdbinary):
    """Stops notes or code from getting lost on their way into the prompt, that of training."""
    seen = []
    real = data.encode_prompt
    monkeypatch.setattr(
        data, "encode_prompt", lambda example, *rest: seen.append(example) or real(example, *rest)
    )
    (tmp_path / "notes").write_bytes(b"\xef\xbb\xbf\r\nin1d is gone.\r\nUse isin.\r\n")
    mixed = (OLD + "\r\n").replace("np\n", "np\r\n").encode()
    for content in (mixed, (OLD + "\n").replace("\n", "\r\n").encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        flags = ["--update-file", "notes", "--version", "==2.1"]
        assert program(None, rename, *flags, file="-") == 1
        code = OLD.replace("np\n", "np\n\n")
        assert seen.pop() == data.Example("np", "2.1", "", "in1d is gone.\nUse isin.", code, "")
        out = capfdbinary.readouterr().out
        assert b"--- a/stdin\n+++ b/stdin\n" in out and out.count(b"\n-") == 1


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


@pytest.mark.slow
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
