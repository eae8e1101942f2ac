"""Python files to change: found, read as Python reads them, their diff, written."""

import ast
import difflib
import io
import os
import re
import subprocess
import sys
import tokenize
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from lib.config import BadInput, first_line
from lib.files import read_bytes, write

BROKEN = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)
SUFFIXES = (".py", ".pyi")
SKIPPED = {".git", ".venv", "venv", "__pycache__", "node_modules"}  # directories not searched


@dataclass
class Source:
    """A Python file as it is and as it becomes."""

    name: str  # "-" for stdin
    path: str = "stdin"  # in a patch
    encoding: str = "utf-8"
    text: str = ""  # with the file's line endings
    new: str = ""  # the text that it becomes
    errors: list = field(default_factory=list)  # lines of text


def parse(code):
    """The syntax tree of code that compiles; await at the top level is for notebooks."""
    with warnings.catch_warnings(action="ignore"):  # odd escapes in strings
        compile(code, "code", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        return ast.parse(code)


def find(names):
    """Sources of files, and of the Python files below directories, sorted; every file comes once.

    Links below a directory are not followed. A directory without Python files is left to read().
    """
    found = {}  # real path -> Source; git and patch do not follow links
    for name in names:
        files = []
        for path in sorted(Path(name).rglob("*")) if os.path.isdir(name) else ():
            skipped = SKIPPED & set(path.relative_to(name).parts)
            if path.suffix in SUFFIXES and path.is_file() and not (skipped or path.is_symlink()):
                files.append(str(path))
        for file in files or [name]:
            found.setdefault(Path(os.path.realpath(file)), Source(file))
    files = [path for path, source in found.items() if source.name != "-"]
    root = patch_root(files) if files else None
    for path in files:
        found[path].path = path.relative_to(root).as_posix()
    return list(found.values())


def patch_root(paths):
    """The directory to which a patch is relative: git's work tree, else here, else above all."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    trees = [path for path in (common, *common.parents) if (path / ".git").exists()]
    here = Path.cwd()
    root = [*trees, here if common.is_relative_to(here) else common][0]
    if root != here:
        print(f"note: the patch is relative to {root}; apply it there", file=sys.stderr)
    return root


def read(source):
    """Fill in a Source from its file. Raises BadInput for all but valid Python code."""
    name = source.name
    if name != "-" and not name.endswith(SUFFIXES):
        why = "not a .py or .pyi file, nor a directory with some"
        raise BadInput(f"{name}: {why}; other Python code can come from stdin")
    if re.search(r"[\n\r\t]", name):
        raise BadInput(f"{name!r}: a patch cannot hold this name; rename the file")
    content = read_bytes(name)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)  # PEP 263
        text = content.decode(encoding)
        if text.encode(encoding) != content:
            raise ValueError(f"{encoding} does not give the same bytes again")
        parse(text)
    except (*BROKEN, LookupError) as error:
        why = f"invalid in Python {sys.version.split()[0]}: {first_line(error)}"
        raise BadInput(f"{name}: {why}; fix it, or save it as UTF-8")
    if text.lstrip().startswith("{") and '"nbformat"' in text:  # JSON that often compiles
        raise BadInput(f"{name}: a notebook; convert it with jupyter nbconvert --to script")
    source.encoding, source.text, source.new = encoding, text, text


def unified(source):
    """The diff, bytes, as `git apply` and `patch -p1` take it; empty if nothing changes."""
    texts = source.text, source.new
    old, new = [io.BytesIO(text.encode(source.encoding)).readlines() for text in texts]
    end = "\t" if " " in source.path else ""  # tells patch where a name with blanks ends
    names = [os.fsencode(f"{side}/{source.path}{end}") for side in "ab"]
    lines = difflib.diff_bytes(difflib.unified_diff, old, new, *names)
    last = b"\n\\ No newline at end of file\n"
    return b"".join(line if line.endswith(b"\n") else line + last for line in lines)


def check_clean(source):
    """Raise BadInput unless git has the file as it is now."""
    folder, file = os.path.split(os.path.realpath(source.name))
    command = ["git", "--literal-pathspecs", "-C", folder, "status", "--porcelain", "--ignored"]
    try:
        done = subprocess.run([*command, "--", file], capture_output=True, errors="replace")
        fault = done.stderr if done.returncode else done.stdout  # git may warn of other things
    except OSError as error:  # no git
        fault = str(error)
    if fault:
        why = f"{source.name} is not in git as it is ({first_line(fault)})"
        raise BadInput(f"--write: {why}; commit it, or use --force")


def save(source):
    """Change the file in place; where that fails, or it has changed since, an error remains."""
    try:
        if read_bytes(source.name) != source.text.encode(source.encoding):
            raise BadInput(f"{source.name}: changed since it was read; left alone")
        write(Path(os.path.realpath(source.name)), source.new.encode(source.encoding))
    except BadInput as error:
        source.errors.append(str(error))
