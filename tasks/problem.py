"""What the benchmarks share: a problem, the request, the rows of their files."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import data
from training.config import BadInput

SYSTEM = "You write Python code. {}Think first, then answer."
OBEY = "Follow the update notes you are given, even where they contradict what you remember of a library. "
REQUEST = "Reason inside <think> </think>, then give the complete code inside <answer> </answer>, in a ```python fence."


@dataclass(frozen=True)
class Problem:
    """One problem. A migration task has a name, a package and its example, the others all but the example."""

    name: str
    package: str = ""
    update_type: str = ""
    note: str = ""  # of the update; --no-update leaves it out of the prompt
    question: str = ""
    reference: str = ""
    setup: str = ""  # runs before the answer's code
    update: str = ""  # runs between the two: the statement that puts the new function into its library
    tests: tuple = ()
    entry_point: str | None = None  # the function that check() of HumanEval's tests is given
    example: data.Example | None = None


HUB_FILES = {"leo-liuzy/CodeUpdateArena": "arena-ungrouped.jsonl", "evalplus/humanevalplus": "test.jsonl"}


def locate(source):
    """The local path of `source`: the path itself, or the hub's file, downloaded once and cached."""
    if Path(source).is_file():
        return Path(source)
    if source not in HUB_FILES:
        raise BadInput(f"data: no file {source!r}; give a JSONL file (.gz too) or a hub id: {', '.join(HUB_FILES)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(source, HUB_FILES[source], repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"data: cannot fetch {source!r} from the hub ({reason}); give a local JSONL file")


def read_rows(source):
    """Yield (where, row) for every line of a JSONL file, gzipped or not; `where` names file and line."""
    path = locate(source)
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{path}: cannot be unpacked ({error}); download it again")
    yield from data.json_rows(path, content)


def broken(where, field, why):
    return BadInput(f"{where}: field {field!r} {why}; mend the row or take it out")


def texts(where, row, names):
    """The values of the fields `names`, separated by blanks; each must be text."""
    for name in names.split():
        value = row.get(name)
        if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
            raise broken(where, name, "is not text" if name in row else "is missing")
    return [row[name] for name in names.split()]
