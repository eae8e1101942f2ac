"""eval.py and tasks/: estimators against their definitions, files, prompts, verdicts, killed runs.

Tests that run code need the sandbox's Linux. ../shared/data may hold two of the benchmarks.
"""

import colorsys
import contextlib
import copy
import errno
import gzip
import itertools
import json
import math
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SHARED, cells

import data
import eval
import reward
import tasks
import tasks.judging
import tasks.migration
import tasks.problem
import tasks.table
import training.run
from lib import files, loading, parallel
from lib.config import BadInput

UPDATE = {  # of our own making: a function of the standard library gets a second argument
    "description": "colorsys.rgb_to_yiq takes a scale.",
    "rationale": "Bytes are more usual than shares {of 1}.",
    "docstring": "The three parts are divided by `scale` first.",
    "signature": "colorsys.rgb_to_yiq(r, g, b, scale=1.0)",
    "imports": "import colorsys\nold = colorsys.rgb_to_yiq",
    "implementation": (
        "def rgb_to_yiq(r, g, b, scale=1.0):\n    return old(r / scale, g / scale, b / scale)"
    ),
    "update_type": "add-argument",
    "function_path": "colorsys.rgb_to_yiq",
    "package": "colorsys",
    "update_id": "[colorsys.rgb_to_yiq]:[add-argument]:[update-0]",
}
TESTS = """\
def test_white():
    expected = 1.0

    assert abs(luma(255, 255, 255) - expected) < 1e-6


def test_black():
    assert luma(0, 0, 0) == 0
"""
SOLVED = {
    "scenario": "A picture has bytes for colours.",
    "problem": "Return the luma of a colour {r, g, b}.",
    "solution_signature": "def luma(r, g, b):",
    "unit_tests": TESTS,
    "ref_solution": (
        "import colorsys\n\n"
        "def luma(r, g, b):\n    return colorsys.rgb_to_yiq(r, g, b, scale=255)[0]"
    ),
}
RENAMED = UPDATE | {
    "signature": "colorsys.luma_of(r, g, b)", "update_type": "modify-function-name",
    "implementation": "def luma_of(r, g, b):\n    return old(r, g, b)",
}  # fmt: skip


def arena_rows(schema, update=UPDATE, count=2):
    """The same problems in each of the three schemas that are in circulation."""
    examples = [SOLVED | {"prog_syn_id": f"p{i}"} for i in range(count)]
    imports = update["imports"]
    if schema == "nested":
        return [{"update": update, "update_id": "u", "imports": imports, **e} for e in examples]
    examples = [example | {"prog_syn_imports": imports} for example in examples]
    if schema == "grouped":
        return [{"update": update, "prog_syn_examples": examples}]
    return [{**update, **example} for example in examples]


HUMAN = {
    "task_id": "Own/0", "entry_point": "double",
    "prompt": (
        "import math\n\ndef double(x: float) -> float:\n"
        '    """Twice the number.\n    >>> double(2)\n    4\n    """\n'
    ),
    "canonical_solution": "    return math.fsum([x, x])\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0.5) == 1\n",
}  # fmt: skip
ROOTS = {
    "task_id": "Own/1", "entry_point": "find_zero",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "prompt": 'def find_zero(xs: list):\n    """A root of the polynomial xs."""\n',
}  # fmt: skip
PLUS = {"base_input": [[2]], "plus_input": [[0.1], [1e300], [-7]], "atol": 0}


def answer(code, thought="so"):
    return f"\n{thought}\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


@pytest.fixture
def arena(write_rows):
    return tasks.load("codeupdatearena", write_rows(arena_rows("flat")))


# ------------------------------------------------------------------------- metrics


def test_pass_at_k_is_the_mean_over_all_subsets():
    """Stops a biased estimate, e.g. 1 - (1 - c/n)^k.

    Every subset is counted, and human-eval's product agrees.
    """
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        for c in range(n + 1 if k <= n else 0):
            hits = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
            assert eval.pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    for n, c, k in itertools.product((5, 20, 200, 1000), (0, 1, 3, 5), (1, 5, 10, 100)):
        if k <= n:
            product = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
            assert abs(eval.pass_at_k(n, c, k) - product) < 1e-12


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (5, 1, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_pass_at_k_is_refused_where_it_is_undefined(n, c, k):
    """Stops pass@5 of four samples counting as solved, as it does in the original."""
    with pytest.raises(ValueError, match=f"pass@{k} from {n} samples"):
        eval.pass_at_k(n, c, k)


def test_interval_is_that_of_the_mean_over_problems():
    """Stops an interval of single problems, or of one tail; the normal one is the oracle."""
    N, p = 500, 0.3
    share = np.r_[np.full(int(N * p), 0.9), np.full(N - int(N * p), 0.1)]  # no 0 or 1: eq. 2
    for values, expected in ((share, 0.34), (1 - share, 0.66)):
        mean, low, high = tasks.table.interval(values)
        half = 1.96 * 0.8 * math.sqrt(p * (1 - p) / N)
        assert mean == pytest.approx(expected)
        assert low == pytest.approx(expected - half, abs=0.005)
        assert high == pytest.approx(expected + half, abs=0.005)


@pytest.mark.parametrize("right, N, low, high", [
    (0, 20, 0.0, 0.161130), (20, 20, 0.838870, 1.0), (0, 1, 0.0, 0.793457), (1, 1, 0.206543, 1.0),
    (1, 10, 0.017876, 0.404156), (50, 100, 0.403830, 0.596170), (0, 164, 0.0, 0.022888),
])  # fmt: skip
def test_wilson_by_hand(right, N, low, high):
    """Stops an interval without width at 0 of n and n of n, and one that leaves [0, 1].

    At 0 of n it is z^2 / (n + z^2), e.g. 3.8416 / 23.8416; the others were found as the roots x of
    (p - x)^2 = z^2 x (1 - x) / n.
    """
    values = [1.0] * right + [0.0] * (N - right)
    mean, *ends = tasks.table.interval(values)
    assert mean == right / N and ends == pytest.approx([low, high], abs=1e-6)
    assert 0 <= ends[0] <= mean <= ends[1] + 1e-12 and ends[0] < ends[1] <= 1
    assert tasks.table.wilson(right / N, N) == pytest.approx([low, high], abs=1e-6)


def test_interval_where_all_problems_agree():
    """Stops certainty about problems that were never seen, also for rewards and changes.

    Of 7 equal problems eq. 1 lets w = 3.8416 / 10.8416 differ, each by as much as the range allows.
    """
    w = 1.96**2 / (7 + 1.96**2)
    expected = [0.4, 0.4 - w * 0.4, 0.4 + w * 0.6]
    assert tasks.table.interval(np.full(7, 0.4)) == pytest.approx(expected)
    assert tasks.table.interval([2.0] * 7, -2, 2) == pytest.approx([2.0, 2.0 - 4 * w, 2.0])
    assert tasks.table.interval([0.0] * 7, -1, 1) == pytest.approx([0.0, -w, w])
    assert tasks.table.interval([1.0] * 7, -1, 1) == pytest.approx([1.0, 1.0 - 2 * w, 1.0])


def rows_of(*verdicts):
    """Log rows of one problem: u passes thanks to the update, p passes, f fails, n has no code."""
    rows = []
    for verdict in verdicts:
        passed = verdict in "up"
        row = {"format": True, "cut": False, "no_code": verdict == "n"}
        row |= {"passed": passed, "updated": verdict == "u"}
        rows.append(row | {"status": "pass" if passed else "fail"})
    return rows


def test_metrics_of_a_problem_by_hand():
    """Stops UPass@k counting answers that never needed the update, and missing code uncounted."""
    got = tasks.table.metrics(rows_of(*"upfnf"), [1, 5])
    assert got == pytest.approx({
        "pass@1": 0.4, "pass@5": 1, "UPass@1": 0.2, "UPass@5": 1, "pass_if_formed": 0.4,
        "format": 1, "no_code": 0.2, "cut": 0})  # fmt: skip
    got = tasks.table.metrics([{"passed": True, "format": True, "stale": 0.0, "es_star": 2.0}], [1])
    assert list(got) == ["pass@1", "pass_if_formed", "es_star", "stale", "format"]


def test_metrics_without_a_value():
    """Stops ill-formed answers counting as wrong ones in pass_if_formed, and None counting as 0.

    Logs of earlier versions have None for stale where no change is asked for.
    """
    right, wrong = {"passed": True, "stale": None}, {"passed": False, "stale": None}
    rows = [right | {"format": False}, right | {"format": True}, wrong | {"format": True}]
    got = tasks.table.metrics(rows, [1])
    assert got["pass@1"] == pytest.approx(2 / 3) and got["pass_if_formed"] == 0.5
    assert got["stale"] is None
    got = tasks.table.metrics(rows[:1], [1])
    assert got["pass@1"] == 1 and got["format"] == 0 and got["pass_if_formed"] is None


def problem(name, package="", update_type="", update=""):
    fixed = {"question": "", "reference": "", "control": "", "setup": "", "tests": ()}
    more = {"package": package, "update_type": update_type, "update": update}
    return tasks.problem.Problem(name=name, **fixed, **more)


def table_of(found, verdicts, ks=(1,)):
    args = SimpleNamespace(num_samples=len(verdicts[0]), k=list(ks))
    rows = {}
    for problem, text in zip(found, verdicts):
        for j, row in enumerate(rows_of(*text)):
            rows[problem.name, j] = row
    return tasks.table.tabulate(found, rows, args)


def test_table_by_group():
    """Stops groups that lose or repeat problems."""
    found = [problem(f"p{i}", "ab"[i > 0], f"kind{i}", update="x") for i in range(3)]
    result = table_of(found, ["uu", "uf", "nf"])
    table = result["table"]
    assert {group: row["problems"] for group, row in table.items()} == {
        "all": 3, "a": 1, "b": 2, "kind0": 1, "kind1": 1, "kind2": 1}  # fmt: skip
    assert table["all"]["pass@1"][0] == 0.5 and table["b"]["pass@1"][0] == 0.25
    assert table["b"]["no_code"][0] == 0.25
    assert result["problems"]["p1"]["UPass@1"] == 0.5
    assert result["statuses"] == {"pass": 3, "fail": 3}
    many = [problem(f"p{i}", f"lib{i}") for i in range(21)]
    groups = table_of(many, ["u"] * 21)["table"]
    assert list(groups) == ["all", *(f"lib{i}" for i in range(21))]


def test_table_has_a_line_per_metric():
    """Stops a table too wide for the screen, without a metric, or with a reversed interval."""
    found = [problem(f"p{i}", "lib", "kind", update="x") for i in range(20)]
    shown = tasks.table.show(table_of(found, ["uu"] * 10 + ["uf"] * 9 + ["nf"], ks=(1, 2)))
    head, rule, *lines, empty, end = shown.splitlines()
    assert cells(head) == ["mean [95 % interval]", "all (20)"] and set(rule) == {"|", "-", " "}
    assert [cells(line)[0] for line in lines] == [
        "pass@1", "pass@2", "UPass@1", "UPass@2", "pass_if_formed", "format", "no_code", "cut",
    ]  # fmt: skip
    values = {cells(line)[0]: cells(line)[1] for line in lines}
    assert values["format"] == "100.0 [83.9, 100.0]"
    assert values["cut"] == "0.0 [0.0, 16.1]"
    assert values["pass@1"][:5] == "72.5 " and values["pass@2"] == "95.0 [76.4, 99.1]"
    assert len({len(line) for line in (head, rule, *lines)}) == 1
    assert empty == "" and end == "20 problems, 11 fail, 29 pass"
    star = {"es_star": [1.5, -0.25, 2.0], "problems": 1}
    shown = tasks.table.show({"table": {"all": star}, "statuses": {}, "problems": {}})
    assert re.search(r"\| es_star +\| 1.50 \[-0.25, 2.00\] \|\n", shown)


@pytest.fixture
def write_table(tmp_path):
    """write_table(run, task, found, verdicts) -> path of a table.json."""

    def write(run, task, found, verdicts):
        path = tmp_path / run / task / "table.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table_of(found, verdicts)))
        return path

    return write


def test_compare_by_hand(tmp_path, write_table):
    """Stops a change against another run than the first, and the loss of a task of one run."""
    found = [problem(f"p{i}", "lib", "kind", update="x") for i in range(4)]
    for run, verdicts in {"base": "uuff", "grpo": "uuuf", "sft": "ffff"}.items():
        write_table(run, "codeupdatearena", found, verdicts)
    write_table("grpo", "humaneval+", [problem("h0")], ["p"])
    runs = [str(tmp_path / run) for run in ("base", "grpo", "sft")]
    head, _, *lines = [cells(line) for line in tasks.table.compare(runs).splitlines()]
    assert head == ["", *runs]
    table = {line[0]: line[1:] for line in lines}
    assert table["codeupdatearena pass@1"] == [
        "50.0", "75.0 +25.0 [+0.0, +75.0]", "0.0 -50.0 [-100.0, +0.0]"]  # fmt: skip
    assert table["humaneval+ pass@1"] == ["-", "100.0", "-"]
    assert table["codeupdatearena format"] == ["100.0"] + ["100.0 +0.0 [-49.0, +49.0]"] * 2
    assert table["humaneval+ pass_if_formed"] == ["-", "100.0", "-"]
    write_table("sft", "codeupdatearena", found[1:], "fff")
    with pytest.raises(BadInput, match="sft: .* pass@1 has other problems than in .*base"):
        tasks.table.compare(runs)
    with pytest.raises(BadInput, match="none: no .*table.json there"):
        tasks.table.compare([*runs, "none"])


def test_compare_pairs_what_both_runs_have(tmp_path, write_table):
    """Stops a missing value counting as 0, a change over unequal problems, and a refusal."""
    found = [problem(f"p{i}") for i in range(4)]
    known = {"base": [None, 0.0, 0.0, 1.0], "grpo": [0.0, 1.0, None, 1.0], "none": [None] * 4}
    for run, values in known.items():
        path = write_table(run, "migration", found, "pppp")
        table = json.loads(path.read_text())
        for i, value in enumerate(values):
            table["problems"][f"p{i}"]["pass_if_formed"] = value
        path.write_text(json.dumps(table))
    shown = tasks.table.compare([str(tmp_path / run) for run in known]).splitlines()
    table = {cells(line)[0]: cells(line)[1:] for line in shown}
    base, grpo, none = table["migration pass_if_formed"]
    assert base == "33.3" and grpo == "66.7 +50.0 [+0.0, +100.0]" and none == "-"


@pytest.mark.parametrize("content", [
    "{}", '{"problems": {}}', '{"problems": 3}', '{"problems": {"p0": 3}}', '{"problems": [{}]}',
    '{"problems": {"p0": {"pass@1": 1}, "p1": {}}}', '{"problems": {"p0": {"pass@1": [1]}}}',
    '{"problems": {"p0": {"pass@1": "x"}}}', '{"problems": {"p0": "ab"}}', "[1", "[]", "3",
])  # fmt: skip
def test_compare_refuses_other_files(tmp_path, write_table, content):
    """Stops a traceback for a table.json that is empty, old, torn or another program's."""
    good = write_table("good", "migration", [problem("p0")], ["p"])
    bad = write_table("bad", "migration", [problem("p0")], ["p"])
    bad.write_text(content)
    with pytest.raises(BadInput, match="bad/migration/table.json") as error:
        tasks.table.compare([str(good.parent.parent), str(bad.parent.parent)])
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------- problems


def test_three_schemas_are_one(write_rows):
    """Stops a release of CodeUpdateArena that cannot be read, or whose fields change places."""
    grouped, nested, flat = [
        tasks.load("codeupdatearena", write_rows(arena_rows(schema)))
        for schema in ("grouped", "nested", "flat")
    ]
    assert grouped == nested == flat and [p.name for p in flat] == ["p0", "p1"]
    one = flat[0]
    assert one.package == "colorsys" and one.update_type == "add-argument"
    assert one.reference == SOLVED["ref_solution"]
    assert one.setup == f"{UPDATE['imports']}\nimport colorsys\n{UPDATE['implementation']}\n"
    assert all(UPDATE[name] in one.note for name in ("description", "signature", "docstring"))
    assert one.control == one.reference and one.update == "colorsys.rgb_to_yiq = rgb_to_yiq"
    assert "{r, g, b}" in one.question
    assert one.tests[0] in one.question and one.tests[1] not in one.question


def test_an_answer_may_use_the_names_of_the_signature(write_rows, monkeypatch):
    """Stops answers that are wrong only because they begin, as they are told, with a signature that
    uses typing's List: half of CodeUpdateArena's.
    """
    code = "def luma(r, g, b) -> List[float]:\n    return colorsys.rgb_to_yiq(r, g, b, 255)[0]\n"
    row = arena_rows("flat")[0]
    row["ref_solution"] = f"from typing import List\nimport colorsys\n\n{code}"
    (one,) = tasks.load("codeupdatearena", write_rows([row]))
    monkeypatch.setattr(colorsys, "rgb_to_yiq", colorsys.rgb_to_yiq)  # puts it back afterwards
    names = {}
    exec(f"{one.setup}\n{one.update}\n{code}\n{one.tests[0]}", names)
    names["test_white"]()


def test_tests_are_split_by_the_parser(write_rows):
    """Stops tests that end at their first blank line, or lose their decorator or an import."""
    code = f"import functools\n{TESTS}\n@functools.cache\ndef test_last():\n    pass\n\n"
    code += "def helper():\n    return 1\n"
    row = arena_rows("flat")[0] | {"unit_tests": code}
    (one,) = tasks.load("codeupdatearena", write_rows([row]))
    assert [test.count("def test_") for test in one.tests] == [1, 1, 1]
    assert "- expected" in one.tests[0]
    assert all("import functools" in test and "def helper" in test for test in one.tests)
    assert "@functools.cache\ndef test_last" in one.tests[2]


@pytest.mark.parametrize("kind, expected", [
    *[(kind, "colorsys.rgb_to_yiq = luma_of") for kind in (
        "add-argument", "add-argument-default_value(s)", "modify-argument-name",
        "modify-output-data_type", "add-output-semantics", "add-function-semantics")],
    ("modify-function-name", "del colorsys.rgb_to_yiq\nsetattr(colorsys, 'luma_of', luma_of)"),
    ("add-function", "setattr(colorsys, 'luma_of', luma_of)"),
])  # fmt: skip
def test_update_statement(write_rows, kind, expected):
    """Stops a renamed function that keeps its old name, or a new one that takes another's place."""
    rows = arena_rows("flat", RENAMED | {"update_type": kind})
    found = tasks.load("codeupdatearena", write_rows(rows))
    assert {problem.update for problem in found} == {expected}


BAD_ARENA = [
    ("{", "not JSON"), ("[1]", "not a JSON object but list"),
    ({"update": 3}, "'int' object is not a mapping"),
    ({"prog_syn_examples": 3}, "'int' object is not iterable"),
    ({"prog_syn_examples": [3]}, "'int' object is not a mapping"),
    *[({name: None}, f"field '{name}' is not text") for name in (
        "description", "signature", "docstring", "implementation", "update_type", "function_path",
        "package", "scenario", "problem", "solution_signature", "unit_tests", "ref_solution",
        "prog_syn_id")],
    ({"prog_syn_imports": None}, "field 'imports' is not text"),
    ({"unit_tests": ["def test(): pass"]}, "'unit_tests' is not text"),
    ({"problem": "\ud800"}, "'problem' is not text"),
    ({"unit_tests": "def test("}, "never closed"),
    ({"unit_tests": "x = 1"}, "no function test* in 'x = 1'"),
    ({"unit_tests": "def helper(): pass"}, "no function test* in 'def helper"),
    ({"implementation": "x"}, "no function * in 'x'"),
    ({"ref_solution": "def"}, "invalid syntax"),
    ({"update_type": "deprecate-function"}, "'deprecate-function' has no rule"),
    ({"update_type": ""}, "'' has no rule"), ({"function_path": "rgb_to_yiq"}, "names no library"),
]  # fmt: skip


@pytest.mark.parametrize("spoilt, word", BAD_ARENA, ids=lambda value: str(value)[:40])
def test_a_broken_row_is_named(write_rows, spoilt, word):
    """Stops a defect of one row in 670 that ends in a traceback, or that no model can solve."""
    rows = arena_rows("flat")
    path = write_rows([rows[0], "", rows[1] | spoilt if isinstance(spoilt, dict) else spoilt])
    pattern = f"^{re.escape(path)}, line 3: .*{re.escape(word)}"
    with pytest.raises(BadInput, match=pattern) as error:
        tasks.load("codeupdatearena", path)
    assert "\n" not in str(error.value)


def test_bad_files(write_rows, tmp_path, monkeypatch):
    """Stops tracebacks for a missing, empty or damaged file, and two problems with one log."""
    for word, path in (
        ("cannot read 'none.jsonl' .*No such file", "none.jsonl"),
        ("cannot read .*Is a directory", str(tmp_path)),
        ("file is empty", write_rows([])),
    ):
        with pytest.raises(BadInput, match=word):
            tasks.load("humaneval", path)
    whole = gzip.compress(json.dumps(HUMAN).encode())
    for spoilt in (whole[:-20], whole[:20] + bytes(20) + whole[40:], b"\x1f\x8bnothing"):
        (tmp_path / "cut.gz").write_bytes(spoilt)
        with pytest.raises(BadInput, match="cannot read '.*cut.gz' .*; give a JSONL file") as error:
            tasks.load("humaneval", str(tmp_path / "cut.gz"))
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="2 problems of .* are called 'Own/0'"):
        tasks.load("humaneval", write_rows([HUMAN, HUMAN]))
    for name in HUMAN:
        row = {key: value for key, value in HUMAN.items() if key != name}
        with pytest.raises(BadInput, match=f"line 2: field '{name}' is missing"):
            tasks.load("humaneval", write_rows([HUMAN, row]))


def test_hub_ids(monkeypatch, tmp_path):
    """Stops a hub id that asks for the wrong file, and a traceback without a network."""
    asked = []

    def offline(*args, **kwargs):
        asked.append((*args, kwargs["repo_type"]))
        raise OSError("no network\nmore")

    monkeypatch.setattr(files, "hf_hub_download", offline)
    for task in ("codeupdatearena", "humaneval+"):
        source = tasks.SOURCES[task]
        words = re.escape(f"of {source!r} from the hub (no network); give a local")
        with pytest.raises(BadInput, match=words):
            tasks.load(task, source)
    assert asked == [
        ("leo-liuzy/CodeUpdateArena", "arena-ungrouped.jsonl", "dataset"),
        ("evalplus/humanevalplus", "test.jsonl", "dataset"),
    ]


def test_prompts_ask_as_training_does(arena, tokenizer, write_rows, rows):
    """Stops a template or request unlike training's, a closed turn, a note with --no-update."""

    def frame(text):
        heads = r"(system\n).*?(<\|im_end\|>\n<\|im_start\|>user\n).*(Reason inside)"
        return re.sub(heads, r"\1\2\3", text, flags=re.DOTALL)

    trained = tokenizer.decode(data.encode_prompt(data.Example(**rows[0]), tokenizer))
    path = write_rows(arena_rows("flat"))
    (human,) = tasks.load("humaneval", write_rows([HUMAN], "human.jsonl"))
    bare_arena, *_ = tasks.load("codeupdatearena", path, no_update=True)
    for problem, without in ((arena[0], bare_arena), (human, human)):
        text = tokenizer.decode(problem.encode(tokenizer))
        complete = "give the complete new code", "give the complete code"
        assert frame(text) == frame(trained).replace(*complete) and text.endswith(data.OPENING)
        assert problem.note in text and problem.question in text
        bare = tokenizer.decode(without.encode(tokenizer))
        assert ("update notes" in text) == bool(problem.note) and "update notes" not in bare
        assert problem.question in bare and "<doc>" not in bare and UPDATE["docstring"] not in bare
    path = write_rows(rows, "migration.jsonl")
    (first, *_) = tasks.load("migration", path)
    assert first.encode(tokenizer) == data.encode_prompt(first.example, tokenizer)
    (first, *_) = tasks.load("migration", path, no_update=True)
    bare = tokenizer.decode(first.encode(tokenizer))
    assert "double_0" in trained and "double_0" not in bare and "twice_0" in bare
    plain = tokenizer.decode(arena[0].encode(untemplated(tokenizer)))
    assert plain.endswith("\n\n" + data.OPENING)
    assert arena[0].question + tasks.problem.REQUEST in plain


def untemplated(tokenizer):
    """The tokenizer, but without a chat template."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


@pytest.mark.parametrize("task", ["humaneval", "humaneval+"])
def test_plain_prompt(tokenizer, write_rows, task):
    """Stops a plain form with training's request, a system message of ours, or a closed turn."""
    (problem,) = tasks.load(task, write_rows([HUMAN]), plain=True)
    text = tokenizer.decode(problem.encode(tokenizer))
    question = f"```python\n{HUMAN['prompt'].strip()}\n```"
    assert question in text and "Complete this function in a markdown python code block" in text
    turn = [{"role": "user", "content": problem.question}]
    shown = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert text == shown + "```python\n"
    assert not re.search("think|answer|system|step by step", text.lower())
    ids = problem.encode(untemplated(tokenizer))
    assert tokenizer.decode(ids) == f"{problem.question.rstrip()}\n\n```python\n"
    (usual,) = tasks.load(task, write_rows([HUMAN]))
    assert tokenizer.decode(usual.encode(tokenizer)).endswith(data.OPENING)


def test_plain_code_ends_at_the_fence(write_rows):
    """Stops talk after the fence that is run, code that is lost without one, and empty answers."""
    (problem,) = tasks.load("humaneval", write_rows([HUMAN]), plain=True)
    code = "def double(x):\n    return 2 * x"
    assert problem.extract(f"{code}\n```\nIt doubles.\n```python\nx\n```") == (code, True)
    assert problem.extract(code) == (code, False)  # no closing fence
    assert problem.extract(f"{code}  # not ```\n    # ``` here\n```") == (
        f"{code}  # not ```\n    # ``` here", True)  # fmt: skip
    for text in ("", "\n", "\n```\nNo idea."):
        assert problem.extract(text)[0] is None
        verdict = {"format": "```" in text, "no_code": True, "passed": False}
        assert problem.judge(text, None) == verdict | {"status": "no code"}


# ------------------------------------------------------------------------- verdicts


class Box:
    """Stands in for the sandbox: "new" in the code passes with the update, "old" without it."""

    def __init__(self):
        self.calls = []

    def run(self, code, tests, setup="", entry_point=None):
        self.calls.append((code, tests, setup, entry_point))
        passed = ("new" if "rgb_to_yiq = rgb_to_yiq" in setup else "old") in code
        return Outcome("pass" if passed else "fail")


@dataclass
class Outcome:
    status: str
    reason: str = ""

    @property
    def passed(self):
        return self.status == "pass"


def test_verdict_needs_the_update(arena):
    """Stops UPass@k for code that also passes without the update, and tests run for no code."""

    def judged(completion):
        return arena[0].judge(completion, Box())

    both, only = judged(answer("# old, new")), judged(answer("# new"))
    assert both["passed"] and not both["updated"] and only["passed"] and only["updated"]
    assert only["status"] == "pass" and only["format"] and not only["no_code"]
    assert not judged(answer("# old"))["passed"] and not judged(answer("# none"))["updated"]
    box = Box()
    open_thought = "new ```python\nnew\n``` and no end of thought"
    for text in ("", "\n</think>\n<answer>new</answer>", open_thought):
        verdict = arena[0].judge(text, box)
        assert verdict["no_code"] and not verdict["passed"]
        assert not verdict["updated"] and verdict["status"] == "no code"
    assert not box.calls
    arena[0].judge(answer("first\n```\n```python\nlast"), box)
    setup = f"{arena[0].setup}\n{arena[0].update}\n"
    assert box.calls == [("last", arena[0].tests, setup, None)]


def test_verdict_on_a_migration(write_rows, rows):
    """Stops metrics that are not those of the rewards, or code that is run without need."""
    (problem, *_) = tasks.load("migration", write_rows(rows))
    old, new = rows[0]["old_code"], rows[0]["new_code"]
    for code in (new, old, "x = (", None):
        text = "no code" if code is None else answer(code)
        got = problem.judge(text, None)
        assert got["passed"] == (code == new) and got["stale"] == (code == old)
        assert got["es_star"] == reward.es_star(text, new) and got["no_code"] == (code is None)
        assert got["em_star"] == reward.em_star(text, new) and got["format"] == (code is not None)
        assert got["reward"] == reward.score(text, new)
    same = rows[1] | {"new_code": rows[1]["old_code"] + "  # as before"}
    (problem,) = tasks.load("migration", write_rows([same]))
    got = problem.judge(answer(same["old_code"]), None)
    assert got["passed"] and got["stale"] == 0 and problem.update_type == "no change"


def test_references_by_hand(arena, capsys):
    """Stops a check that passes although references fail, or pass without the update."""

    def case(name, code):
        return replace(arena[0], name=name, reference=code, control=code)

    good = [case(f"g{i}", "new") for i in range(19)]
    assert tasks.judging.references([*good, case("bad", "none")], Box()) == 0
    out = capsys.readouterr().out
    assert "bad: fail" in out and "references: 19 of 20 pass, 0 of the controls" in out
    assert tasks.judging.references([*good[1:], case("bad", "none")], Box()) == 1
    assert tasks.judging.references([*good, case("leak", "old, new")], Box()) == 1
    assert "leak: its control passes" in capsys.readouterr().out


@pytest.fixture
def box_for():
    """box_for(found): the sandbox for these problems; skips where there is none."""
    pytest.importorskip("sandbox")
    with contextlib.ExitStack() as stack:

        def opened(found):
            try:
                return stack.enter_context(tasks.judging.open_sandbox(found, unsafe=False))
            except BadInput as error:
                pytest.skip(str(error))

        yield opened


def test_arena_in_the_sandbox(write_rows, box_for, capsys):
    """Stops a program in the wrong order: imports, then the update, then the answer."""
    code = SOLVED["ref_solution"].replace("rgb_to_yiq", "luma_of").replace("scale=255", "")
    renamed = SOLVED | {"ref_solution": code, "prog_syn_id": "renamed"}
    renamed = {name: text.replace("255", "1") for name, text in renamed.items()}
    rows = [*arena_rows("nested", count=1), arena_rows("flat", RENAMED, 1)[0] | renamed]
    found = tasks.load("codeupdatearena", write_rows(rows))
    box = box_for(found)
    assert tasks.judging.references(found, box) == 0
    assert "2 of 2 pass, 0 of the controls" in capsys.readouterr().out
    old = "import colorsys\ndef luma(r, g, b):\n    return colorsys.rgb_to_yiq(r, g, b)[0]"
    stale = found[1].judge(answer(old), box)
    assert not stale["passed"] and "rgb_to_yiq" in stale["reason"]
    known = "def luma(r, g, b):\n    return (0.3 * r + 0.59 * g + 0.11 * b) / 255"
    knows = found[0].judge(answer(known), box)
    assert knows["passed"] and not knows["updated"]


def test_an_answer_may_return_its_own_objects(write_rows, box_for, capsys):
    """Stops references of CodeUpdateArena from failing because they return their own objects."""
    code = (
        "import colorsys\nclass Colour:\n    luma = colorsys.rgb_to_yiq(255, 0, 0, scale=255)[0]\n"
        "luma = lambda: Colour()"
    )
    tests = "def test():\n    assert 0.2 < luma().luma < 0.4\n"
    row = arena_rows("flat")[0] | {"ref_solution": code, "unit_tests": tests}
    found = tasks.load("codeupdatearena", write_rows([row]))
    assert tasks.judging.references(found, box_for(found)) == 0
    assert "1 of 1 pass, 0 of the controls" in capsys.readouterr().out


def answers_from(texts):
    """A stand-in for eval.complete whose completions are `texts`, {problem: [text]}."""

    def complete(model, tokenizer, batch, args):
        rows = []
        for problem, _, _ in batch:
            for j, text in enumerate(texts[problem.name]):
                row = {"problem": problem.name, "sample": j, "completion": text}
                rows.append(row | {"tokens": 1, "cut": False})
        return rows

    return complete


def means_of(directory):
    result = json.loads((directory / "table.json").read_text())
    table = result["table"]["all"]
    return {name: table[name][0] for name in table if name != "problems"}, result["statuses"]


def test_migrations_from_end_to_end(command, write_rows, rows, monkeypatch, tmp_path):
    """Stops rows that ask for no change from being mixed in, unseen, or from being called stale.

    Oracle: one greedy answer a row, whose metrics are counted by hand.
    """
    for i in (4, 5):
        rows[i]["new_code"] = f"# comments do not count\n{rows[i]['old_code']}"
    new = [row["new_code"] for row in rows]
    ill_formed = answer(new[1]).replace("</think>", "</think> Here:")
    texts = [answer(new[0]), ill_formed, answer(rows[2]["old_code"]), "?"]
    texts += [answer(new[4]), answer("x = (")]
    monkeypatch.setattr(eval, "complete", answers_from({str(i): [t] for i, t in enumerate(texts)}))
    path = write_rows(rows, "some.jsonl")
    greedy = ["--data", path, "--num-samples", "1", "--temperature", "0"]
    assert eval.main(command(*greedy)) == 0
    result = json.loads((tmp_path / "run/migration/table.json").read_text())
    counted = {  # group: by row, None for what does not count
        "pass@1": [1, 1, 0, 0, 1, 0], "pass_if_formed": [1, None, 0, None, 1, 0],
        "stale": [0, 0, 1, 0, 0, 0], "format": [1, 0, 1, 0, 1, 1],
        "no_code": [0, 0, 0, 1, 0, 0],
    }  # fmt: skip
    counted["es_star"] = [reward.es_star(text, code) for text, code in zip(texts, new)]
    far = 5 / len(new[2])  # twice and double are five edits apart
    assert counted["es_star"][2] == pytest.approx(3.5 * (1 - far) - 1.5)
    assert counted["es_star"][3:] == [-2, 2, -2]
    signs = [1, -1, 1, -1, 1, 1]
    counted["reward"] = [star + sign for star, sign in zip(counted["es_star"], signs)]
    for group, some in (("all", range(6)), ("change", range(4)), ("no change", (4, 5))):
        assert result["table"][group]["problems"] == len(some)
        for name, values in counted.items():
            known = [values[i] for i in some if values[i] is not None]
            if known:
                assert result["table"][group][name][0] == pytest.approx(np.mean(known)), name
            else:
                assert name not in result["table"][group]
    assert result["problems"]["3"]["pass_if_formed"] is None
    shown = (tmp_path / "run/migration/table.md").read_text().splitlines()
    assert cells(shown[0])[1:] == ["all (6)", "change (4)", "no change (2)"]
    table = {cells(line)[0]: cells(line)[1:] for line in shown if line.startswith("|")}
    assert [cell.split()[0] for cell in table["stale"]] == ["16.7", "25.0", "0.0"]
    half = "50.0 [9.5, 90.5]"  # one of two
    assert table["pass_if_formed"] == ["50.0 [15.0, 85.0]", half, half]


def test_arena_from_end_to_end(command, write_rows, box_for, monkeypatch, tmp_path):
    """Stops verdicts that end up with the wrong sample, or metrics that are not the log's."""
    path = write_rows(arena_rows("flat"), "arena.jsonl")
    box_for(tasks.load("codeupdatearena", path))
    knows = "def luma(r, g, b):\n    return (0.3 * r + 0.59 * g + 0.11 * b) / 255"
    texts = {
        "p0": [answer(SOLVED["ref_solution"]), answer(knows), "?"],
        "p1": [answer("def luma():"), "?", answer(knows)],
    }
    monkeypatch.setattr(eval, "complete", answers_from(texts))
    assert eval.main(command("--task", "codeupdatearena", "--data", path, "--k", "1", "2")) == 0
    means, statuses = means_of(tmp_path / "run/codeupdatearena")
    assert means == pytest.approx({
        "pass@1": 3 / 6, "pass@2": 5 / 6, "UPass@1": 1 / 6, "UPass@2": 2 / 6,
        "pass_if_formed": (2 / 2 + 1 / 2) / 2, "format": 4 / 6, "no_code": 2 / 6, "cut": 0,
    })  # fmt: skip
    assert statuses == {"pass": 3, "no code": 2, "fail": 1}


def test_plain_humaneval_from_end_to_end(command, write_rows, box_for, monkeypatch, tmp_path):
    """Stops a plain answer that is looked for in answer tags, and the two forms in one log."""
    path = write_rows([HUMAN, HUMAN | {"task_id": "Own/1"}, HUMAN | {"task_id": "Own/2"}])
    box_for(tasks.load("humaneval", path))
    right = "def double(x):\n    return math.fsum([x, x])"
    texts = {
        "Own/0": [f"{right}\n```\nThe sum is exact.\n```python\nassert False\n```"],
        "Own/1": [right.replace("x, x", "x")],
        "Own/2": [right],  # cut before its fence
    }
    monkeypatch.setattr(eval, "complete", answers_from(texts))
    greedy = ("--task", "humaneval", "--data", path, "--temperature", "0", "--num-samples", "1")
    assert eval.main(command(*greedy, "--k", "1", "--prompt", "plain")) == 0
    means, statuses = means_of(tmp_path / "run/humaneval-plain")
    assert means == pytest.approx({
        "pass@1": 2 / 3, "pass_if_formed": 1, "format": 1 / 3, "no_code": 0, "cut": 0,
    })  # fmt: skip
    assert statuses == {"pass": 2, "fail": 1}
    assert eval.main(command(*greedy, "--k", "1")) == 0  # the same texts, asked for in tags
    means, statuses = means_of(tmp_path / "run/humaneval")
    assert means["pass@1"] == 0 and means["no_code"] == 1 and statuses == {"no code": 3}
    assert "pass_if_formed" not in means  # no answer is well-formed
    os.rename(tmp_path / "run/humaneval-plain", tmp_path / "run/plain")
    (tmp_path / "run/humaneval").rename(tmp_path / "run/humaneval-plain")
    with pytest.raises(BadInput, match="prompt was 'recode' in .*, now 'plain'"):
        eval.main(command(*greedy, "--prompt", "plain"))


def test_humaneval_in_the_sandbox(write_rows, box_for, capsys):
    """Stops a failing reference, a passing empty body, and floats compared to the last bit."""
    bare = {k: v for k, v in HUMAN.items() if k != "test"}
    roots = ROOTS | {"base_input": [[[3, 2]]], "plus_input": [[[-1, 4]]], "atol": 1e-4}
    found = tasks.load("humaneval", write_rows([HUMAN]))
    found += tasks.load("humaneval+", write_rows([bare | PLUS, roots]))
    box = box_for(found)
    assert tasks.judging.references(found, box) == 0
    assert "3 of 3 pass, 0 of the controls" in capsys.readouterr().out

    def judged(problem, code):
        return problem.judge(answer(code), box)["passed"]

    assert judged(found[0], "def double(x):\n    return math.fsum([x, x])")  # the prompt's import
    assert judged(found[1], "def double(x):\n    return x * 2.0000000001")
    assert not judged(found[1], "def double(x):\n    return x * 2 + 1e-3")
    assert not judged(found[1], "def double(x):\n    return 2 * x if x == 2 else 0")
    assert not judged(found[1], "def double(x):\n    return str(2 * x)")
    assert judged(found[2], "def find_zero(xs):\n    return -xs[0] / xs[1] + 1e-6")
    assert not judged(found[2], "def find_zero(xs):\n    return 7.0")
    assert not judged(found[0], "return 2 * x")


# ------------------------------------------------------------------------- runs


@pytest.fixture
def command(tmp_path, checkpoints, write_rows, rows):
    """command(*more): the arguments of a small evaluation into tmp_path/run."""
    fixed = ["--model", checkpoints["qwen2"], "--data", write_rows(rows, "migration.jsonl")]
    fixed += ["--max-new-tokens", "8", "--batch", "2", "--num-samples", "3"]

    def arguments(*more, output="run"):
        return [*fixed, "--output", str(tmp_path / output), *more]

    return arguments


def log_of(directory):
    """{(problem, sample): row} of a finished evaluation, where each sample was logged once."""
    merged = {}
    for path in directory.glob("migration/samples*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            key = row["problem"], row["sample"]
            assert key not in merged, "sampled or judged twice"
            merged[key] = row
    return merged


def test_run_directory(command, tmp_path, capsys):
    """Stops an evaluation that leaves less than it promises, or samples that are all the same."""
    assert eval.main(command("--k", "1", "2")) == 0
    out, path = capsys.readouterr().out, tmp_path / "run" / "migration"
    names = {file.name for file in path.iterdir()}
    assert names == {"config.json", "samples.jsonl", "table.json", "table.md"}
    log, table = log_of(tmp_path / "run"), json.loads((path / "table.json").read_text())
    assert log.keys() == {(str(i), j) for i in range(6) for j in range(3)}
    for row in log.values():
        assert isinstance(row["completion"], str) and row["tokens"] <= 8
        assert row["passed"] is False
    assert len({row["completion"] for row in log.values()}) > 12
    assert table["table"]["all"].keys() == {
        "problems",
        "pass@1",
        "pass@2",
        "reward",
        "es_star",
        "em_star",
        "stale",
        "obeys",
        "determined",
        "format",
        "no_code",
        "cut",
    }  # fmt: skip  no answer is well-formed, so pass_if_formed has no value
    assert table["table"]["all"]["cut"][0] == np.mean([row["cut"] for row in log.values()]) > 0.5
    assert json.loads((path / "config.json").read_text())["num_samples"] == 3
    assert (path / "table.md").read_text() in out and "mathlib" not in out
    assert table["table"]["mathlib"]["problems"] == 6
    assert max(len(line) for line in out.split("\n") if line.startswith("|")) <= 100


def test_killed_runs_go_on(command, tmp_path, monkeypatch):
    """Stops a resumed run that samples twice, chokes on a torn row, or ends with other samples."""
    assert eval.main(command(output="whole")) == 0
    complete, judge, calls = eval.complete, tasks.migration.Migration.judge, Counter()

    def kill(at):
        def killed(*args):
            calls["batches"] += 1
            if calls["batches"] == at:
                raise KeyboardInterrupt
            return complete(*args)

        monkeypatch.setattr(eval, "complete", killed)

    def counted(*args):
        calls["judged"] += 1
        return judge(*args)

    monkeypatch.setattr(tasks.migration.Migration, "judge", counted)
    kill(3)
    with pytest.raises(KeyboardInterrupt):
        eval.main(command())
    log = tmp_path / "run" / "migration" / "samples.jsonl"
    assert len(log_of(tmp_path / "run")) == 6  # the second batch was being judged
    log.write_bytes(log.read_bytes()[:-15])
    calls.clear()
    kill(None)
    assert eval.main(command()) == 0
    assert calls["batches"] == 3 and calls["judged"] == 1 + 6 + 6  # of the torn batch, one row
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    whole = tmp_path / "whole/migration/table.md"
    assert (log.parent / "table.md").read_text() == whole.read_text()
    monkeypatch.setattr(loading, "load_model", None)  # nothing is left that needs it
    done = calls.copy()
    assert eval.main(command("--k", "3")) == 0 and calls == done


def test_ranks_share_the_work(command, tmp_path, monkeypatch):
    """Stops samples that depend on the number of ranks, prompts that two ranks sample, or none."""
    assert eval.main(command(output="whole")) == 0
    found = tasks.load("migration", command()[3])
    directory = tmp_path / "run" / "migration"
    directory.mkdir(parents=True)
    for rank in (1, 0):
        monkeypatch.setattr(parallel, "RANK", rank)
        monkeypatch.setattr(parallel, "WORLD", 2)
        eval.sample_and_judge(found, directory, None, eval.parse(command()))
    assert {path.name for path in directory.iterdir()} == {"samples.jsonl", "samples-1.jsonl"}
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_a_run_directory_is_a_model(command, checkpoints, tmp_path, monkeypatch):
    """Stops --model runs/grpo from measuring the untrained model, or other held-out rows."""
    asked = []
    load = loading.load_policy
    run = tmp_path / "trained"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    heldout = command()[3]
    settings = {"model": checkpoints["qwen2"], "heldout": heldout, "max_new_tokens": 5}
    (run / "config.json").write_text(json.dumps(settings))

    def load_policy(base, adapter, dtype):
        asked.append((base, adapter))
        return load(base, "", dtype)

    monkeypatch.setattr(loading, "load_policy", load_policy)
    fixed = ["--num-samples", "1", "--output", str(tmp_path / "run")]
    assert eval.main(["--model", str(run), *fixed]) == 0
    assert asked == [(checkpoints["qwen2"], str(run / "adapter"))]
    kept = json.loads((tmp_path / "run/migration/config.json").read_text())
    assert kept["adapter"] == str(run / "adapter") and kept["data"] == heldout
    assert kept["model"] == checkpoints["qwen2"] and kept["max_new_tokens"] == 5
    args = eval.parse(["--model", str(run), "--adapter", str(run)])
    assert args.adapter == str(run) and args.model == checkpoints["qwen2"]


def test_sampling_settings_arrive(command, tmp_path):
    """Stops a top-p, temperature or seed that is only written down."""
    settings = {"sharp": ["--top-p", "1e-9"], "cold": ["--temperature", "0"]}
    settings["other"] = ["--seed", "7"]
    texts = {}
    for output, more in settings.items():
        assert eval.main(command(*more, output=output)) == 0
        texts[output] = [row["completion"] for row in log_of(tmp_path / output).values()]
    assert texts["sharp"] == texts["cold"]
    assert len(set(texts["cold"])) <= 6 < len(set(texts["other"]))


@pytest.mark.parametrize("late", [False, True])
def test_a_judge_that_fails_ends_the_run(command, monkeypatch, late):
    """Stops a broken sandbox from going unnoticed in a thread while the GPU works on."""
    judge, complete, calls = tasks.migration.Migration.judge, eval.complete, []

    def broken(*args):
        if not late or len(calls) == 6:
            raise ZeroDivisionError
        return judge(*args)

    def counted(*args):
        calls.append(0)
        return complete(*args)

    monkeypatch.setattr(tasks.migration.Migration, "judge", broken)
    monkeypatch.setattr(eval, "complete", counted)
    with pytest.raises(ZeroDivisionError):
        eval.main(command("--batch", "1"))
    assert len(calls) == (6 if late else 2)


def test_judges_work_while_the_next_batch_is_sampled(command, monkeypatch):
    """Stops a GPU that idles until the last program of a batch has timed out."""
    judge, complete = tasks.migration.Migration.judge, eval.complete
    sampled = threading.Semaphore(0)  # batches after the first

    def patient(*args):
        assert sampled.acquire(timeout=60)
        sampled.release()
        return judge(*args)

    def counted(*args):
        if calls:
            sampled.release()
        calls.append(0)
        return complete(*args)

    calls = []
    monkeypatch.setattr(tasks.migration.Migration, "judge", patient)
    monkeypatch.setattr(eval, "complete", counted)
    assert eval.main(command()) == 0 and len(calls) == 3


def test_full_disk(command, tmp_path, monkeypatch):
    """Stops a traceback when the disk is full, and a log that cannot be continued after it."""

    def full(path, mode):
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    monkeypatch.setattr(training.run, "open", full, raising=False)
    with pytest.raises(BadInput, match="cannot write .*jsonl: No space left.*same command again"):
        eval.main(command())
    monkeypatch.undo()
    assert eval.main(command()) == 0


def test_a_closed_pipe_ends_quietly(monkeypatch):
    """Stops `eval.py --compare ... | head` from ending in a traceback."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        monkeypatch.setattr(tasks.table, "compare", lambda runs: "| a table |\n")
        monkeypatch.setattr("sys.argv", ["eval.py", "--compare", "some", "runs"])
        with pytest.raises(SystemExit) as stop:
            parallel.run_main(eval.main)
        assert stop.value.code == 0
        closed.write("what Python flushes at exit")
        closed.flush()


@pytest.mark.parametrize("changes, word", [
    *[([flag, value], flag) for flag in ("--num-samples", "--max-new-tokens", "--batch")
      for value in ("0", "two")],
    (["--top-p", "0"], "--top-p"), (["--top-p", "1.1"], "--top-p"),
    (["--temperature", "-1"], "--temperature"), (["--temperature", "nan"], "--temperature"),
    (["--seed", "-1"], "--seed"), (["--k", "4"], "--k 4"), (["--k", "0"], "--k 0"),
    (["--task", "magic"], "magic"), (["--data", "none.jsonl"], "none.jsonl"),
    (["--data", "", "--task", "humaneval"], "openai/human-eval"),
    (["--references"], "--references"),
    (["--model", "runs/none", "--data", ""], "no directory 'runs/none'"),
    (["--task", "humaneval+", "--no-update"], "--no-update"),
    (["--prompt", "plain"], "--prompt plain"), (["--prompt", "fancy"], "--prompt"),
    (["--task", "codeupdatearena", "--prompt", "plain"], "only for humaneval"),
    (["--model", "none"], "no directory 'none'"), (["--adapter", "none"], "none"),
    (["--model", "./none"], "model: no directory './none'"),
    (["--model", "tests/none"], "model: no directory 'tests/none'"),
    (["--adapter", "tests/none"], "tests/none/adapter_config.json: cannot be read"),
    (["--data", "tests/none.jsonl"], "data: no file 'tests/none.jsonl'"),
    (["--compare", "none"], "none"), (["--compare", "tests", "tiny"], "--compare tests"),
    (["--speed", "9"], "--speed"),
])  # fmt: skip
def test_bad_settings(command, tmp_path, monkeypatch, capfd, changes, word):
    """Stops a senseless setting from costing an hour before it is noticed, or a traceback."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["eval.py", *command(*changes)])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(eval.main)
    stderr = capfd.readouterr().err.split("\r")[-1]
    assert stop.value.code == 2 and word in stderr and not list(tmp_path.glob("run/*/samples*"))
    assert re.search(r"^error: .+\n$", stderr, re.MULTILINE) and "Traceback" not in stderr


def test_another_evaluation_is_not_mixed_in(command, checkpoints):
    """Stops samples of two models, seeds or data files in one log; a changed file is another.

    A file that was only copied again is the same, so a half-done evaluation can go on.
    """
    assert eval.main(command()) == 0
    changes = {
        "seed was 42": ["--seed", "7"],
        "top_p was 0.7": ["--top-p", "1"],
        "model was": ["--model", checkpoints["llama"]],
        "no_update was False": ["--no-update"],
    }
    for word, more in changes.items():
        with pytest.raises(BadInput, match=word):
            eval.main(command(*more))
    source = Path(command()[3])
    os.utime(source)
    assert eval.main(command()) == 0
    source.write_text(source.read_text() + "\n")
    with pytest.raises(BadInput, match="files of data was .*give another"):
        eval.main(command())


def test_defaults_are_the_embedded_model_on_heldout_tasks():
    """Stops a default that measures training data, or other n, T and top-p than the arena's."""
    args = eval.parse([])
    assert os.path.samefile(args.model, ROOT / "tiny")
    assert os.path.samefile(args.data, ROOT / "tiny" / "heldout.jsonl")
    assert (args.num_samples, args.temperature, args.top_p) == (5, 0.8, 0.7)
    assert (args.k, args.max_new_tokens, args.prompt) == ([1, 5], 64, "recode")
    args = eval.parse("--model some/model --task codeupdatearena --num-samples 1".split())
    assert (args.data, args.k) == ("leo-liuzy/CodeUpdateArena", [1])
    assert args.max_new_tokens == 1024


# ------------------------------------------------------------------------- the real benchmarks


def shared(name):
    path = SHARED / "data" / name
    return str(path) if path.exists() else pytest.skip(f"needs ../shared/data/{name}")


def test_real_humaneval(box_for, capsys):
    """Stops a HumanEval that is not HumanEval: 164 solutions pass, 164 empty bodies fail."""
    found = tasks.load("humaneval", shared("HumanEval.jsonl.gz"))
    assert tasks.judging.references(found, box_for(found)) == 0
    assert "references: 164 of 164 pass, 0 of the controls" in capsys.readouterr().out


def test_real_arena(box_for, capsys, tokenizer):
    """Stops a loader that loses problems or tests; some references run, with and without."""
    found = tasks.load("codeupdatearena", shared("codeupdatearena-part.jsonl"))
    assert len(found) == 296 and sum(len(problem.tests) for problem in found) == 1863
    assert all(problem.encode(tokenizer) for problem in found)
    known = [p for p in found if p.package in ("math", "re", "itertools")]
    some = [p for p in known if "scipy" not in p.setup][::10]
    assert tasks.judging.references(some, box_for(some)) == 0
    out = capsys.readouterr().out
    assert f"references: {len(some)} of {len(some)} pass, 0 of the controls" in out
