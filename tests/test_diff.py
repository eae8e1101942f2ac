"""grpo.py, dapo.py and sft.py are one text: only the algorithm differs, equation by equation."""

import ast
import dataclasses
import re
import subprocess

import pytest
from conftest import ROOT

import dapo
import grpo
import sft

MAX_CHANGED = 36  # changed lines between grpo.py and dapo.py
PLUMBING = re.compile(
    r"^\W*(import |from |if __name__|run\b|parser|def )"
    r"|training\.|run\.(save|finish|begin|watch)|log\("
)


def diff(old, new):
    """What `diff old new` prints."""
    return subprocess.run(["diff", old, new], capture_output=True, text=True).stdout


def hunks(text):
    """The hunks of a diff, each with its header line."""
    return [hunk for hunk in re.split(r"(?m)^(?=\d)", text) if hunk]


def equations(source):
    """The numbers of the equations that a script's docstring states."""
    return set(re.findall(r"\(eq\. (\d+)\)", ast.get_docstring(ast.parse(source))))


def violation(old, new):
    """The first hunk between two scripts that is no part of the lesson, and why; or None."""
    stated, text = equations(old.read_text()) & equations(new.read_text()), diff(old, new)
    for hunk in hunks(text):
        lines = [line[2:] for line in hunk.split("\n") if line[:1] in "<>"]
        for side in re.findall(r"(?m)(?:^<.*\n?)+|(?:^>.*\n?)+", hunk):
            numbers = {
                n
                for found in re.findall(r"eq\. ([\d, ]+)", side)
                for n in re.findall(r"\d+", found)
            }
            if not numbers or not numbers <= stated:
                return f"no equation that both docstrings state:\n{hunk}"
        if bad := [line for line in lines if PLUMBING.search(line)]:
            return f"plumbing, {bad[0]!r}:\n{hunk}"
    count = len(re.findall(r"(?m)^[<>]", text))
    return f"{count} changed lines, {MAX_CHANGED} at most:\n{text}" if count > MAX_CHANGED else None


def test_the_diff_is_the_lesson():
    """Stops dapo.py from differing from grpo.py in anything but the algorithm."""
    found = violation(ROOT / "grpo.py", ROOT / "dapo.py")
    assert found is None, found


@pytest.mark.parametrize(
    "old, new, word",
    [
        ("import math\n", "import math\nimport sys\n", "import sys"),
        ("run.log(", "run.write_log(", "write_log"),
        ("    active = S != ratio * A\n", "    active = S < ratio * A\n", "no equation"),
        ("# eq. 8\n", "# the weights\n", "no equation"),
        ("# eq. 8\n", "# eq. 12\n", "eq. 12"),
        ("parallel.seed_dropout(", "parallel.seed_dropout(1 + ", "seed_dropout"),
        ("# eq. 1\n", "# eq. 1\n" + 20 * "        # eq. 1\n", "36 at most"),
    ],
)
def test_the_diff_test_can_fail(tmp_path, old, new, word):
    """Stops a diff test that accepts an import, a renamed call or a change without an equation."""
    text = (ROOT / "dapo.py").read_text()
    assert old in text
    (tmp_path / "dapo.py").write_text(text.replace(old, new, 1))
    assert word in violation(ROOT / "grpo.py", tmp_path / "dapo.py")


def test_same_functions_in_the_same_order():
    """Stops a reader from having to search for a function's counterpart, and a different main."""
    trees = [ast.parse((ROOT / f"{name}.py").read_text()).body for name in ("grpo", "dapo", "sft")]
    names = [
        [node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for tree in trees
    ]
    assert names[0] == names[1] and names[0][-1] == "main"
    assert names[2] == [name for name in names[0] if name != "objective_terms"]
    mains = [ast.unparse(tree[-2]) for tree in trees]
    assert mains[0].startswith("def main(") and len(set(mains)) == 1
    imports = [
        [ast.unparse(n) for n in tree if isinstance(n, ast.Import | ast.ImportFrom)]
        for tree in trees
    ]
    assert imports[0] == imports[1]
    assert imports[2] == [line for line in imports[0] if line != "import dora"]  # no reference


def test_settings_are_the_same_but_for_the_algorithm():
    """Stops settings from drifting apart: a comparison of the three would compare them too."""
    settings = [
        {f.name: f.default for f in dataclasses.fields(s.Config) if f.name != "output"}
        for s in (grpo, dapo, sft)
    ]
    same = lambda other: {name for name, value in settings[0].items() if other.get(name) != value}
    assert same(settings[1]) == {"prompts_per_step", "clip_high", "beta", "updates"}
    assert settings[1].keys() - settings[0].keys() == {"max_tries", "overlong_cache"}
    assert same(settings[2]) == {"num_samples", "clip_low", "clip_high", "beta"}  # has none
    assert settings[2].keys() - settings[0].keys() == set()


def test_the_lesson_shows_the_diff_as_it_is():
    """Stops a lesson that shows an old diff or leaves out a hunk."""
    shown = (ROOT / "docs" / "lesson.md").read_text()
    for hunk in hunks(diff(ROOT / "grpo.py", ROOT / "dapo.py")):
        assert hunk.rstrip("\n") in shown, hunk
