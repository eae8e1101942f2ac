"""A user's Python file: read as it is, shown as a diff, changed in one step, never harmed.

What the model sees is the code alone. Byte-order mark, line endings, blank lines around the code and
the end of the last line are kept here and put back, so that a diff shows what the model changed.
"""

import contextlib
import difflib
import itertools
import os
import re
import shutil
import sys
from pathlib import Path

import reward
from data import BadInput

BLANK = "\ufeff \t\r\n\f"  # may stand around the code


def read_text(name):
    """The text of a file, of stdin for "-", exactly as it is. BadInput if it is not UTF-8 or cannot be read."""
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 at byte {error.start}; save it as UTF-8 first")
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {error.strerror}")


def read_code(name):
    """The text of a Python file as it is, and its code as a model is to see it. BadInput where that cannot be."""
    text = read_text(name)
    code = re.sub("\r\n?", "\n", text.strip(BLANK))
    if not reward.strip_comments(code):
        raise BadInput(f"{name}: no code in it; give a Python file")
    if not reward.parses(code):
        raise BadInput(f"{name}: does not parse as Python {sys.version_info[0]}.{sys.version_info[1]}; mend it first")
    if "\n```" in code or "</answer>" in code:
        raise BadInput(f"{name}: has ``` at the start of a line or </answer>, where an answer would end; take that out")
    if len(set(re.findall("\r\n|\r|\n", text))) > 1:
        raise BadInput(f"{name}: mixes line endings; make them one kind first, with dos2unix say")
    return text, code


def splice(text, code):
    """`text`, a whole file, with other code: its line endings and what stands around the code stay."""
    head, _, tail = text.partition(text.strip(BLANK))
    ending = re.search("\r\n|\r|\n|$", text)[0] or "\n"
    return head + code.replace("\n", ending) + tail


def unified(old, new, name):
    """The diff of two texts as `patch` and `git apply` take it, list of lines; none if they are equal."""
    parts = [re.findall("[^\n]*\n|[^\n]+", text) for text in (old, new)]  # splitlines() would part at form feeds too
    lines = difflib.unified_diff(*parts, name, name)
    return [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]


def check_writable(name):
    """BadInput where overwrite() would fail, before the model is put to work."""
    path = Path(os.path.realpath(name))
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise BadInput(f"--write: no right to write {path} or in its directory; leave --write out and keep the diff")


def beside(path, ending, content):
    """Write bytes into a new file beside `path`, with its rights: old.py.bak, or old.py.bak1 where that exists."""
    for number in itertools.count():
        fresh = path.with_name(f"{path.name}{ending}{number or ''}")
        with contextlib.suppress(FileExistsError):
            file = open(fresh, "xb")
            break
    try:
        with file:
            shutil.copymode(path, fresh)
            with contextlib.suppress(PermissionError, AttributeError):  # only root gives files away; no Windows does
                os.chown(fresh, path.stat().st_uid, path.stat().st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        fresh.unlink()
        raise
    return fresh


def overwrite(path, old, new):
    """Put the text `new` in the place of `old`, in one step and through links; the path of the copy it keeps."""
    path = Path(os.path.realpath(path))
    try:
        if path.read_bytes() != old.encode():
            raise BadInput(f"{path}: was changed while the model was at work; start again")
        aside = beside(path, ".new", new.encode())
        try:
            backup = beside(path, ".bak", old.encode())
            os.replace(aside, path)
        except OSError:
            aside.unlink()
            raise
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; it is as it was")
    return backup
