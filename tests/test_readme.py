"""README.md and docs/ against the code: commands run or at least parse, quotes are up to date.

A command is run, in a copy of the project, if it needs no GPU and no network. A hub id is replaced
by the embedded model, and SHORT makes long commands fast. The other commands (CHECKED) must name
files and flags that exist.

    python tests/test_readme.py        after a change of grpo.py: updates the quoted code
"""

import contextlib
import difflib
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT
from test_diff import diff, hunks
from torch.distributed.run import get_args_parser

import data
import migrate
import lib.config

README = (ROOT / "README.md").read_text()
PAGES = {  # in the README's order, in which their commands also run
    name: (ROOT / name).read_text()
    for name in ("README.md", *dict.fromkeys(re.findall(r"\((docs/\w+\.md)[)#]", README)))
}
TEXT = "\n".join(PAGES.values())
LESSON = PAGES["docs/lesson.md"]
DIFF = re.compile(r"(?ms)^```diff\n(.*?)\n```")
EQUATION = re.compile(r"(?m)^\| `([\w/]+\.py)` \| (?:(\d+) )?\| (.+?) \| `(.+)` \|$")
SHORT = {  # settings with which a command takes seconds
    **dict.fromkeys(
        ("grpo.py", "dapo.py", "sft.py"),
        "--steps 1 --prompts-per-step 2 --max-new-tokens 16 --model tiny",
    ),
    "eval.py": "--data few.jsonl --num-samples 1 --k 1 --max-new-tokens 16",
    "tools.check_data": "--model tiny",
    "migrate.py": "--num-samples 2 --max-new-tokens 16",
}
CHECKED = re.compile(  # not run, and why
    r"^pip |-m pytest"  # needs the network; would start this test again
    r"|torchrun|--adapter none"  # several processes: see test_parallel.py
    r"|tools\.experiments|bench\.py"  # slow with any settings
    r"|--task "  # data that is not in the repository
    r"|naive_grpo"  # test_naive.py runs it
)
OTHERS = re.compile(r"(vllm|python llama\.cpp/\S+) ")  # third-party programs
READERS_FILES = (  # files that the reader brings
    "old.py", "notes.txt", "my.jsonl", "few.jsonl", "one.jsonl", "two.jsonl", "HumanEval.jsonl.gz",
    "FILE",
)  # fmt: skip


def blocks():
    """The commands of all bash blocks, in order, without output redirection."""
    for block in re.findall(r"(?ms)^```bash\n(.*?)^```", TEXT):
        for line in re.sub(r"\\\n\s*|(?<=\|)\n\s*", " ", block).splitlines():
            if line and not line.startswith("#") and not re.match(r"\w+=", line):
                yield re.sub(r" > \S+$", "", line)


def inline():
    """The commands quoted in sentences and tables."""
    found = re.findall(r"`((?:python|torchrun) [^`]+)`", TEXT)
    return [" ".join(command.split()) for command in found if not OTHERS.match(command)]


def programs(command):
    """The words of every program in a command line."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&")
    lexer.whitespace_split = True
    groups = itertools.groupby(lexer, lambda word: word in ("|", "&&"))
    return [list(words) for is_mark, words in groups if not is_mark]


def flags_of(module):
    """The flags that --help of a program shows; an empty set if it takes none."""
    if "main" not in vars(module):
        return set()
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        with mock.patch("sys.argv", [module.__name__, "--help"]):
            module.main(*[["--help"]] * len(inspect.signature(module.main).parameters))
    return set(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


def split(words):
    """(script or module, its arguments), from `python FILE ...` or `python -m NAME ...`."""
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def load(script):
    """Import grpo.py, bench/bench.py or tools.plan by that name."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def parse(script, argv):
    """Parse `argv` with the script's own parser; without one, look up its flags in --help."""
    module = load(script)
    if "Config" in vars(module):
        return lib.config.parse_config(module.Config, argv, "")
    if function := getattr(module, "parse", None) or getattr(module, "parse_migration", None):
        return function(argv)
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    if unknown := given and given - flags_of(module):
        raise data.BadInput(f"{script}: no flag {unknown}")


def check_command(words, monkeypatch):
    """Fail if a command names a program, file or flag that does not exist."""
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                args = get_args_parser().parse_args(words[1:])
            except SystemExit:
                raise data.BadInput(printed.getvalue())
        ranks = int(args.nproc_per_node) * int(args.nnodes.split(":")[-1])
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        words = ["python", args.training_script, *args.training_script_args]
    if words[0] == "pip":
        words, files = [], words[words.index("-r") + 1 :] if "-r" in words else []
    elif words[:3] == ["python", "-m", "pytest"]:
        words, files = [], [word for word in words[3:] if not word.startswith("-")]
    else:
        assert words[0] == "python", f"{words[0]}: no rule for this program"
        script, argv = split(words)
        files = [script.replace(".", "/") + ".py" if words[1] == "-m" else script]
        files += [word for word in argv if re.fullmatch(r"[\w./-]+\.(py|jsonl|txt|gz)", word)]
    for name in files:
        assert name in READERS_FILES or (ROOT / name).exists(), f"no file {name}"
    if words:
        script, argv = split(words)
        parse(script, [word for word in argv if word != "..."])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy of the project in which commands may write, with the reader's own files."""
    folders = ("lib", "training", "tasks", "sandbox", "tools", "tiny", "figures")
    for path in (*ROOT.glob("*.py"), *(ROOT / folder for folder in folders)):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    few = (ROOT / "tiny" / "train.jsonl").read_text().splitlines()[:20]
    for name, count in (("my.jsonl", 20), ("few.jsonl", 20), ("one.jsonl", 1), ("two.jsonl", 2)):
        (tmp_path / name).write_text("\n".join(few[:count]) + "\n")
    (tmp_path / "notes.txt").write_text("in1d was removed; use isin.\n")
    for name in ("old.py", "src/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import numpy\nx = numpy.in1d(a, b)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(migrate, "__file__", str(tmp_path / "migrate.py"))
    return tmp_path


def run_here(words):
    """Run one command in this process, which saves the imports: (exit status, output)."""
    shown = io.TextIOWrapper(io.BytesIO(), write_through=True)  # a patch is bytes
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        if words[1] == "-c":
            exec(words[2].replace("Qwen/Qwen2.5-Coder-7B-Instruct", "tiny"), {})
            return 0, shown.buffer.getvalue().decode()
        script, argv = split(words)
        module = load(script)
        if "main" not in vars(module):
            command = [sys.executable, *words[1:]]
            return subprocess.run(command, stdout=subprocess.DEVNULL).returncode, ""
        if "--compare" not in argv and "--dry-run" not in argv:
            parse(script, argv)  # before SHORT can hide a mistake
        extra = [] if "--compare" in argv else SHORT.get(script, "").split()
        if script in ("grpo.py", "dapo.py", "sft.py"):
            extra += ["--heldout", "" if "--output" in argv else "two.jsonl"]  # eval.py needs one
        return module.main([*argv, *extra]), shown.buffer.getvalue().decode()


def runnable(words):
    return not CHECKED.search(" ".join(words)) and not OTHERS.match(" ".join(words))


@pytest.mark.slow
def test_commands_run(place, monkeypatch):
    """Stops a documented command that fails, e.g. for a renamed flag, file or function."""
    from tools import experiments

    monkeypatch.setattr(experiments, "SPLITS", experiments.SPLITS[:1])
    few = data.load_examples("few.jsonl")
    real = data.load_examples

    def load_few(*args):
        return real(*args)[:20] or few

    monkeypatch.setattr(experiments.data, "load_examples", load_few)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for line in dict.fromkeys(blocks()):  # two pages may have the same command
        if " | " in line or line.startswith("cat "):
            command = ["bash", "-c", line]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode in (0, 1, 3), f"{line}\n{done.stderr}"
            assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
        else:
            for words in filter(runnable, programs(line)):
                status, shown = run_here(words)
                fine = (0, 1, 3) if words[1] == "migrate.py" else (0,)
                assert status in fine, f"{line}\n{shown}"
                ran += 1
    assert ran > 20
    assert (place / "runs" / "compare.html").exists()
    assert (place / "merged" / "config.json").exists()


def test_commands_parse(place, monkeypatch):
    """Stops an outdated flag, value or file in commands that are too slow to run, or inline."""
    found = [words for line in blocks() for words in programs(line)]
    found = [words for words in found if CHECKED.search(" ".join(words))]
    found += [words for line in inline() for words in programs(line)]
    assert len(found) > 20
    run = {"model": "tiny", "heldout": "few.jsonl", "output": "runs/grpo"}  # as if grpo.py had run
    for name, settings in (("config.json", run), ("adapter/adapter_config.json", {})):
        (place / "runs" / "grpo" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "runs" / "grpo" / name).write_text(json.dumps(settings))
    for words in found:
        with monkeypatch.context() as patch:
            check_command(words, patch)


@pytest.mark.parametrize(
    "line, word",
    [
        ("python grpo.py --kl 0.1", "kl"),
        ("python eval.py --task humaneval --data HumanEval.jsonl.gz --reference", "reference"),
        ("python -m tools.experiments --seeds 3", "seeds"),
        ("python ppo.py", "ppo.py"),
        ("torchrun --nproc-per-gpu 8 dapo.py", "nproc-per-gpu"),
        ("torchrun --nproc-per-node 8 grpo.py --model Qwen/Qwen2.5-Coder-7B-Instruct", "8 ranks"),
        ("python -m pytest tests/test_nothing.py", "test_nothing"),
        ("make all", "no rule"),
    ],
)
def test_a_stale_command_is_found(place, monkeypatch, line, word):
    """Stops rules so lenient that a command which cannot work passes them."""
    with pytest.raises((AssertionError, data.BadInput), match=word):
        check_command(programs(line)[0], monkeypatch)


def test_files():
    """Stops a table that lacks a file, or names one that is gone."""
    table = README.partition("## The files")[2].partition("\n## ")[0]
    stated = re.findall(r"(?m)^\| `([\w/]+\.py)` \|", table)
    assert all((ROOT / name).is_file() for name in stated)
    assert {path.name for path in ROOT.glob("*.py")} <= set(stated)
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)  # file.py:name, file.py:Class.name
    assert len(named) > 5
    for name, function in named:
        owner = load(name)
        for part in function.split("."):
            assert hasattr(owner, part), f"{name} has no {function}"
            owner = getattr(owner, part)
    for name, function in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", TEXT):
        assert (ROOT / "tests" / name).is_file(), name
        text = (ROOT / "tests" / name).read_text()
        assert not function or f"\ndef {function}(" in text, f"{name} has no {function}"


def test_quoted_equations_are_in_the_code():
    """Stops a quoted line of code that is gone or now has another equation's number."""
    table = LESSON.partition("## The equations")[2].partition("\n## ")[0]
    rows = EQUATION.findall(table)
    assert len(rows) > 20
    for name, number, _, line in rows:
        text = (ROOT / name).read_text()
        assert line in map(str.strip, text.splitlines()), f"{name}: {line}"
        assert "# eq. " not in line or re.search(rf"# eq\. {number}\b", line), line
    for script in ("grpo", "reward", "dora", "eval"):
        numbers = set(re.findall(r"\(eq\. (\d+)\)", (ROOT / f"{script}.py").read_text()))
        assert numbers == {number for name, number, *_ in rows if name == f"{script}.py"}, script


def test_listed_messages_are_in_the_code():
    """Stops the table of messages from listing one that no program prints any more."""
    paths = [*ROOT.glob("*.py")]
    for folder in ("lib", "training", "tasks"):
        paths += ROOT.glob(f"{folder}/*.py")
    sources = "\n".join(path.read_text() for path in paths)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # join strings split over lines
    table = PAGES["docs/troubleshooting.md"]
    messages = re.findall(r"(?m)^\| `([^`]+ [^`]+)` \|", table)
    assert len(messages) > 10
    for message in messages:
        for part in message.replace("No space left on device", "").split("..."):
            assert part.strip() in sources, part


def test_form():
    """Stops paths of one machine, and prose wider than 100 columns."""
    assert not re.findall(r"(?<![\w.:/~*])/[a-z]\w*/", TEXT.replace("#!/bin/bash", ""))
    for name, text in PAGES.items():
        prose = re.sub(r"(?ms)^```.*?^```", "", text)
        wide = [line for line in prose.splitlines() if len(line) > 100 and line[0] not in "|!["]
        assert not wide, f"{name}: {wide}"


def test_the_readme_is_short():
    """Stops a README too long for a reader's first hour."""
    assert len(README.splitlines()) <= 250
    assert len(README.split()) <= 2600


def anchors(text):
    """The valid #anchors of a page: its headings in the form that links use."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links():
    """Stops a link to a missing page, figure or heading, and a page without a link to it."""
    assert set(PAGES) - {"README.md"} == {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}
    checked = 0
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            page, _, part = target.partition("#")
            path = (ROOT / name).parent / page if page else ROOT / name
            assert path.exists(), f"{name}: {target}"
            assert not part or part in anchors(path.read_text()), f"{name}: {target}"
            checked += 1
    assert checked > 20


def test_the_readme_shows_hunks_of_the_diff():
    """Stops a README with an old hunk of the diff, or without a hunk of code."""
    shown = [part.rstrip("\n") for block in DIFF.findall(README) for part in hunks(block)]
    now = [hunk.rstrip("\n") for hunk in hunks(diff(ROOT / "grpo.py", ROOT / "dapo.py"))]
    assert shown and set(shown) <= set(now)
    start = (ROOT / "grpo.py").read_text().splitlines().index("def advantages(rewards):")
    code = [hunk for hunk in now if int(re.match(r"\d+", hunk)[0]) > start]
    assert shown == code


# ------------------------------------------------------------------------- updating the quotes


def closest(text, candidates):
    """The candidate most similar to `text`, or "" if none is similar."""

    def similarity(other):
        return difflib.SequenceMatcher(None, text, other, autojunk=False).ratio()

    best = max(candidates, key=similarity, default="")
    return best if best and similarity(best) > 0.6 else ""


def refresh(text):
    """A page with today's hunks and lines of code, and a list of what must be fixed by hand."""
    now = [hunk.rstrip("\n") for hunk in hunks(diff(ROOT / "grpo.py", ROOT / "dapo.py"))]
    left = []

    def refresh_block(match):
        parts = []
        for old in hunks(match[1]):
            parts.append(closest(old.rstrip("\n"), now))
            if not parts[-1]:
                parts[-1] = old.rstrip("\n")
                left.append(f"no such hunk any more:\n{old}")
        return "```diff\n" + "\n".join(parts) + "\n```"

    def refresh_line(match):
        name, number, _, line = match.groups()
        lines = [x.strip() for x in (ROOT / name).read_text().splitlines() if x.startswith(" ")]
        if line in lines:
            return match[0]
        if number:
            lines = [x for x in lines if re.search(rf"# eq\. {number}\b", x)]
        if found := closest(line, lines):
            return match[0].replace(f"`{line}`", f"`{found}`")
        left.append(f"no such line any more: {name}, {line}")
        return match[0]

    return EQUATION.sub(refresh_line, DIFF.sub(refresh_block, text)), left


def test_refresh():
    """Stops a refresh that changes correct quotes, or that repairs none."""
    assert refresh(LESSON) == (LESSON, [])
    stale = LESSON.replace("# eq. 8", "# the old comment, eq. 8")
    assert stale != LESSON
    assert refresh(stale)[0] == LESSON


def main():
    for name in ("README.md", "docs/lesson.md"):
        text, left = refresh(PAGES[name])
        (ROOT / name).write_text(text)
        print(f"{name}: {'updated' if text != PAGES[name] else 'unchanged'}", *left, sep="\n")
    for hunk in hunks(diff(ROOT / "grpo.py", ROOT / "dapo.py")):
        if hunk.rstrip("\n") not in LESSON:
            print(f"a hunk that was missing from docs/lesson.md:\n{hunk}")


if __name__ == "__main__":
    main()
