"""eval.py and tasks.py: estimators against their definitions, data files, prompts, verdicts, runs that are killed.

Tests that run code need the sandbox's Linux. ../shared/data, where it exists, holds two of the benchmarks.
"""

import contextlib
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
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SHARED

import data
import eval
import tasks
import recode
import reward
from training import loading
from training.config import BadInput
from training import parallel

UPDATE = {  # of our own making: a function of the standard library gets a second argument
    "description": "colorsys.rgb_to_yiq takes a scale.",
    "rationale": "Bytes are more usual than shares {of 1}.",
    "docstring": "The three parts are divided by `scale` first.",
    "signature": "colorsys.rgb_to_yiq(r, g, b, scale=1.0)",
    "imports": "import colorsys\nold = colorsys.rgb_to_yiq",
    "implementation": "def rgb_to_yiq(r, g, b, scale=1.0):\n    return old(r / scale, g / scale, b / scale)",
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
    "ref_solution": "import colorsys\n\ndef luma(r, g, b):\n    return colorsys.rgb_to_yiq(r, g, b, scale=255)[0]",
}
RENAMED = UPDATE | {
    "signature": "colorsys.luma_of(r, g, b)", "update_type": "modify-function-name",
    "implementation": "def luma_of(r, g, b):\n    return old(r, g, b)",
}  # fmt: skip


def arena_rows(schema, update=UPDATE, count=2):
    """The same problems in each of the three schemas that are in circulation."""
    examples = [SOLVED | {"prog_syn_id": f"p{i}"} for i in range(count)]
    if schema == "grouped":
        return [
            {"update": update, "prog_syn_examples": [e | {"prog_syn_imports": update["imports"]} for e in examples]}
        ]
    if schema == "nested":
        return [{"update": update, "update_id": "u", "imports": update["imports"], **e} for e in examples]
    return [{**update, **e, "prog_syn_imports": update["imports"]} for e in examples]


HUMAN = {
    "task_id": "Own/0", "entry_point": "double",
    "prompt": 'import math\n\ndef double(x: float) -> float:\n    """Twice the number.\n    >>> double(2)\n    4\n    """\n',
    "canonical_solution": "    return math.fsum([x, x])\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0.5) == 1\n",
}  # fmt: skip
ROOTS = {
    "task_id": "Own/1", "entry_point": "find_zero", "canonical_solution": "    return -xs[0] / xs[1]\n",
    "prompt": 'def find_zero(xs: list):\n    """A root of the polynomial xs."""\n',
}  # fmt: skip
PLUS = {"base_input": [[2]], "plus_input": [[0.1], [1e300], [-7]], "atol": 0}


def answer(code, thought="so"):
    return f"\n{thought}\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


@pytest.fixture
def arena(write_rows):
    return tasks.load("codeupdatearena", write_rows(arena_rows("flat")))


# ------------------------------------------------------------------------- figures


def test_pass_at_k_is_the_chance_over_all_subsets():
    """Stops a biased estimate, 1 - (1 - c/n)^k say; every subset is counted, and human-eval's product agrees."""
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        for c in range(n + 1) if k <= n else ():
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
    """Stops an interval of single problems or of one tail; the normal approximation of a share is the oracle."""
    N, p = 500, 0.3
    share = np.r_[np.ones(int(N * p)), np.zeros(N - int(N * p))]
    (mean, other), (low, _), (high, _) = eval.interval(np.stack([share, 1 - share], 1))
    half = 1.96 * math.sqrt(p * (1 - p) / N)
    assert mean == pytest.approx(p) and other == pytest.approx(1 - p)
    assert low == pytest.approx(p - half, abs=0.005) and high == pytest.approx(p + half, abs=0.005)
    assert eval.interval(np.full((7, 1), 0.4)).tolist() == pytest.approx(np.full((3, 1), 0.4))


def rows_of(*verdicts):
    """Log rows of one problem from strings: u passes because of the update, p passes, f fails, n has no code."""
    more = {"format": True, "cut": False}
    return [
        more
        | {"passed": v in "up", "updated": v == "u", "no_code": v == "n", "status": "pass" if v in "up" else "fail"}
        for v in verdicts
    ]


def test_figures_of_a_problem_by_hand():
    """Stops UPass@k counting answers that never needed the update, and missing code that is not counted."""
    got = eval.figures(rows_of(*"upfnf"), [1, 5])
    assert got == pytest.approx(
        {"pass@1": 0.4, "pass@5": 1, "UPass@1": 0.2, "UPass@5": 1, "format": 1, "no_code": 0.2, "cut": 0}
    )
    assert list(eval.figures([{"passed": True, "stale": 0.0, "es_star": 2.0}], [1])) == ["pass@1", "es_star", "stale"]


def table_of(found, verdicts, ks=(1,)):
    args = SimpleNamespace(num_samples=len(verdicts[0]), k=list(ks))
    rows = {(p.name, j): row for p, text in zip(found, verdicts) for j, row in enumerate(rows_of(*text))}
    return eval.tabulate(found, rows, args)


def test_table_by_group():
    """Stops groups that lose or repeat problems, and a row per library where every task has its own."""
    found = [tasks.Problem(f"p{i}", "ab"[i > 0], f"kind{i}", update="x") for i in range(3)]
    result = table_of(found, ["uu", "uf", "nf"])
    table = result["table"]
    assert {group: row["problems"] for group, row in table.items()} == {
        "all": 3, "a": 1, "b": 2, "kind0": 1, "kind1": 1, "kind2": 1}  # fmt: skip
    assert table["all"]["pass@1"][0] == 0.5 and table["b"]["pass@1"][0] == 0.25 and table["b"]["no_code"][0] == 0.25
    assert result["problems"]["p1"]["UPass@1"] == 0.5 and result["statuses"] == {"pass": 3, "fail": 3}
    head, _, first, *_ = eval.show(result).splitlines()
    assert re.split(r" *\| *", head) == ["", "", "problems", "pass@1", "UPass@1", "format", "no code", "cut", ""]
    assert re.split(r" *\| *", first)[1:4] == ["all", "3", "50.0 [0.0, 100.0]"]
    many = [tasks.Problem(f"p{i}", f"lib{i}") for i in range(21)]
    assert list(table_of(many, ["u"] * 21)["table"]) == ["all"]


def test_compare_by_hand(tmp_path):
    """Stops a change against another run than the first, unpaired problems, tasks that are only in one run."""
    found = [tasks.Problem(f"p{i}", "lib", "kind", update="x") for i in range(4)]
    for run, verdicts in {"base": "uuff", "grpo": "uuuf", "sft": "ffff"}.items():
        path = tmp_path / run / "codeupdatearena"
        path.mkdir(parents=True)
        (path / "table.json").write_text(json.dumps(table_of(found, list(verdicts))))
    (tmp_path / "grpo" / "humaneval+").mkdir()
    plain = [tasks.Problem("h0")]
    (tmp_path / "grpo/humaneval+/table.json").write_text(json.dumps(table_of(plain, ["p"])))
    runs = [str(tmp_path / run) for run in ("base", "grpo", "sft")]
    head, _, *lines = [re.split(r" *\| *", line) for line in eval.compare(runs).splitlines()]
    column = {heading: [line[i] for line in lines] for i, heading in enumerate(head)}
    assert column["codeupdatearena pass@1"] == ["50.0", "75.0, +25.0 [+0.0, +75.0]", "0.0, -50.0 [-100.0, +0.0]"]
    assert column["humaneval+ pass@1"] == ["-", "100.0", "-"]
    (tmp_path / "sft/codeupdatearena/table.json").write_text(json.dumps(table_of(found[1:], list("fff"))))
    with pytest.raises(BadInput, match="sft: its codeupdatearena has other problems"):
        eval.compare(runs)
    with pytest.raises(BadInput, match="none: no .*table.json there"):
        eval.compare([*runs, "none"])


# ------------------------------------------------------------------------- problems


def test_three_schemas_are_one(write_rows):
    """Stops a release of CodeUpdateArena that cannot be read, or whose fields land in each other's places."""
    load = lambda schema: tasks.load("codeupdatearena", write_rows(arena_rows(schema)))
    first = load("grouped")
    assert load("nested") == first == load("flat") and [p.name for p in first] == ["p0", "p1"]
    one = first[0]
    assert one.package == "colorsys" and one.update_type == "add-argument" and one.reference == SOLVED["ref_solution"]
    assert one.setup == f"{UPDATE['imports']}\n{UPDATE['implementation']}\n"
    assert all(UPDATE[name] in one.note for name in ("description", "signature", "docstring"))
    assert "{r, g, b}" in one.question and one.tests[0] in one.question and one.tests[1] not in one.question


def test_tests_are_parted_by_the_parser(write_rows):
    """Stops tests that end at their first blank line, or lose their decorator or the imports around them."""
    code = (
        "import functools\n" + TESTS + "\n@functools.cache\ndef test_last():\n    pass\n\ndef helper():\n    return 1\n"
    )
    (one,) = tasks.load("codeupdatearena", write_rows([arena_rows("flat")[0] | {"unit_tests": code}]))
    assert [test.count("def test_") for test in one.tests] == [1, 1, 1] and "- expected" in one.tests[0]
    assert all("import functools" in test and "def helper" in test for test in one.tests)
    assert "@functools.cache\ndef test_last" in one.tests[2]


@pytest.mark.parametrize("kind, expected", [
    *[(kind, "colorsys.rgb_to_yiq = luma_of") for kind in (
        "add-argument", "add-argument-default_value(s)", "modify-argument-name", "modify-output-data_type",
        "add-output-semantics", "add-function-semantics")],
    ("modify-function-name", "del colorsys.rgb_to_yiq\nsetattr(colorsys, 'luma_of', luma_of)"),
    ("add-function", "setattr(colorsys, 'luma_of', luma_of)"),
])  # fmt: skip
def test_update_statement(write_rows, kind, expected):
    """Stops a renamed function that keeps its old name, or a new one that takes another's place."""
    found = tasks.load("codeupdatearena", write_rows(arena_rows("flat", RENAMED | {"update_type": kind})))
    assert {problem.update for problem in found} == {expected}


BAD_ARENA = [
    ("{", "not JSON"), ("[1]", "not a JSON object but list"), ({"update": 3}, "field 'update' is not an object"),
    ({"prog_syn_examples": 3}, "'prog_syn_examples' is not a list"),
    ({"prog_syn_examples": [3]}, "'prog_syn_examples' is not a list"),
    *[({name: None}, f"field '{name}' is not text") for name in (
        "description", "signature", "docstring", "implementation", "update_type", "function_path", "package", "scenario",
        "problem", "solution_signature", "unit_tests", "ref_solution", "prog_syn_id", "prog_syn_imports")],
    ({"unit_tests": ["def test(): pass"]}, "'unit_tests' is not text"), ({"problem": "\ud800"}, "'problem' is not text"),
    ({"unit_tests": "def test("}, "'unit_tests' does not parse"), ({"unit_tests": "x = 1"}, "defines no function test"),
    ({"unit_tests": "def helper(): pass"}, "defines no function test"), ({"implementation": "x"}, "defines no function;"),
    ({"update_type": "deprecate-function"}, "'deprecate-function' has no rule"), ({"update_type": ""}, "'' has no rule"),
    ({"function_path": "rgb_to_yiq"}, "names no library"),
]  # fmt: skip


@pytest.mark.parametrize("spoilt, word", BAD_ARENA, ids=lambda value: str(value)[:40])
def test_a_broken_row_is_named(write_rows, spoilt, word):
    """Stops a defect of one row among 670 that ends in a traceback, or passes for a problem no model can solve."""
    rows = arena_rows("flat")
    path = write_rows([rows[0], "", rows[1] | spoilt if isinstance(spoilt, dict) else spoilt])
    with pytest.raises(BadInput, match=f"^{re.escape(path)}, line 3: .*{re.escape(word)}") as error:
        tasks.load("codeupdatearena", path)
    assert "\n" not in str(error.value)


def test_bad_files(write_rows, tmp_path, monkeypatch):
    """Stops tracebacks for a missing, empty or damaged file, and problems that overwrite each other's samples."""
    for word, path in (
        ("no file 'none.jsonl'", "none.jsonl"),
        ("no file", str(tmp_path)),
        ("file is empty", write_rows([])),
    ):
        with pytest.raises(BadInput, match=word):
            tasks.load("humaneval", path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(HUMAN).encode())[:-20])
    with pytest.raises(BadInput, match="cut.gz: cannot be unpacked"):
        tasks.load("humaneval", str(tmp_path / "cut.gz"))
    with pytest.raises(BadInput, match="2 problems of .* are called 'Own/0'"):
        tasks.load("humaneval", write_rows([HUMAN, HUMAN]))
    for name in HUMAN:
        with pytest.raises(BadInput, match=f"line 2: field '{name}' is missing"):
            tasks.load("humaneval", write_rows([HUMAN, {k: v for k, v in HUMAN.items() if k != name}]))


def test_hub_ids(monkeypatch, tmp_path):
    """Stops a hub id that asks for the wrong file, and a missing network that ends in a traceback."""
    asked = []

    def offline(*args, **kwargs):
        asked.append((*args, kwargs["repo_type"]))
        raise OSError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    for task, source in tasks.SOURCES.items():
        with pytest.raises(
            BadInput, match=re.escape(f"cannot fetch {source!r} from the hub (no network); give a local")
        ):
            tasks.load(task, source)
    assert asked == [
        ("leo-liuzy/CodeUpdateArena", "arena-ungrouped.jsonl", "dataset"),
        ("evalplus/humanevalplus", "test.jsonl", "dataset"),
    ]


def test_prompts_ask_as_training_does(arena, tokenizer, write_rows, rows):
    """Stops another template or request than training's, a closed turn, and a note that --no-update leaves in."""
    frame = lambda text: re.sub(
        r"(system\n).*?(<\|im_end\|>\n<\|im_start\|>user\n).*(Reason inside)", r"\1\2\3", text, flags=re.S
    )
    trained = tokenizer.decode(data.encode_prompt(data.Example(**rows[0]), tokenizer))
    (human,) = tasks.load("humaneval", write_rows([HUMAN]))
    for problem in (arena[0], human):
        text = tokenizer.decode(tasks.encode(problem, tokenizer))
        complete = "give the complete new code", "give the complete code"
        assert frame(text) == frame(trained).replace(*complete) and text.endswith(data.OPENING)
        assert problem.note in text and problem.question in text
        bare = tokenizer.decode(tasks.encode(problem, tokenizer, no_update=True))
        assert ("update notes" in text) == bool(problem.note) and "update notes" not in bare
        assert problem.question in bare and "<doc>" not in bare and UPDATE["docstring"] not in bare
    (first, *_) = tasks.load("migration", write_rows(rows))
    assert tasks.encode(first, tokenizer) == data.encode_prompt(first.example, tokenizer)
    bare = tokenizer.decode(tasks.encode(first, tokenizer, no_update=True))
    assert "double_0" in trained and "double_0" not in bare and "twice_0" in bare
    tokenizer = type("Bare", (), {"chat_template": None, "encode": lambda self, text: text})()
    plain = tasks.encode(arena[0], tokenizer)
    assert plain.endswith("\n\n" + data.OPENING) and arena[0].question + tasks.REQUEST in plain


# ------------------------------------------------------------------------- verdicts


class Box:
    """Stands in for the sandbox: code that says "new" passes with the update, code that says "old" without it."""

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
    judge: str = "split"
    passed = property(lambda self: self.status == "pass")


def test_verdict_needs_the_update(arena):
    """Stops UPass@k for code that also passes without the update, and tests that run for no code at all."""
    judged = lambda completion: eval.judge(arena[0], completion, Box())
    both, only = judged(answer("# old, new")), judged(answer("# new"))
    assert both["passed"] and not both["updated"] and only["passed"] and only["updated"]
    assert only["status"] == "pass" and only["format"] and not only["no_code"]
    assert not judged(answer("# old"))["passed"] and not judged(answer("# none"))["updated"]
    box = Box()
    for text in ("", "\n</think>\n<answer>new</answer>", "new ```python\nnew\n``` and no end of thought"):
        verdict = eval.judge(arena[0], text, box)
        assert (
            verdict["no_code"] and not verdict["passed"] and not verdict["updated"] and verdict["status"] == "no code"
        )
    assert not box.calls
    eval.judge(arena[0], answer("first\n```\n```python\nlast"), box)
    assert box.calls == [("last", arena[0].tests, f"{arena[0].setup}\n{arena[0].update}\n", None)]


def test_verdict_on_a_migration(write_rows, rows):
    """Stops figures that are not those of the rewards, or code that is run where nothing needs to be."""
    (problem, *_) = tasks.load("migration", write_rows(rows))
    for code in (rows[0]["new_code"], rows[0]["old_code"], "x = (", None):
        text = "no code" if code is None else answer(code)
        got = eval.judge(problem, text, None)
        assert got["passed"] == (code == rows[0]["new_code"]) and got["stale"] == (code == rows[0]["old_code"])
        assert got["es_star"] == reward.es_star(text, rows[0]["new_code"]) and got["no_code"] == (code is None)
        assert got["em_star"] == reward.em_star(text, rows[0]["new_code"]) and got["format"] == (code is not None)


def test_references_by_hand(arena, capsys):
    """Stops an installation check that passes although references fail, or pass without the update."""
    case = lambda name, code: replace(arena[0], name=name, reference=code)
    good = [case(f"g{i}", "new") for i in range(19)]
    assert eval.references([*good, case("bad", "none")], Box()) == 0
    out = capsys.readouterr().out
    assert "bad: fail" in out and "references: 19 of 20 pass, 0 without the update" in out
    assert eval.references([*good[1:], case("bad", "none")], Box()) == 1
    assert eval.references([*good, case("leak", "old, new")], Box()) == 1
    assert "leak: passes without the update" in capsys.readouterr().out


@pytest.fixture
def box_for():
    """box_for(found): the sandbox that eval.py would open for these problems; skips where there is none."""
    pytest.importorskip("sandbox")
    with contextlib.ExitStack() as stack:

        def opened(found):
            try:
                return stack.enter_context(eval.open_sandbox(found, unsafe=False))
            except BadInput as error:
                pytest.skip(str(error))

        yield opened


def test_arena_in_the_sandbox(write_rows, box_for, capsys):
    """Stops a program put together in the wrong order: the update must come after the imports, before the answer."""
    renamed = {"ref_solution": SOLVED["ref_solution"].replace("rgb_to_yiq", "luma_of").replace("scale=255", "")}
    renamed = {k: v.replace("255", "1") for k, v in (SOLVED | renamed).items()}
    rows = [*arena_rows("nested", count=1), arena_rows("flat", RENAMED, 1)[0] | renamed | {"prog_syn_id": "renamed"}]
    found = tasks.load("codeupdatearena", write_rows(rows))
    box = box_for(found)
    assert eval.references(found, box) == 0
    assert "2 of 2 pass, 0 without the update" in capsys.readouterr().out
    stale = eval.judge(
        found[1], answer("import colorsys\ndef luma(r, g, b):\n    return colorsys.rgb_to_yiq(r, g, b)[0]"), box
    )
    assert not stale["passed"] and "rgb_to_yiq" in stale["reason"]
    knows = eval.judge(found[0], answer("def luma(r, g, b):\n    return (0.3 * r + 0.59 * g + 0.11 * b) / 255"), box)
    assert knows["passed"] and not knows["updated"]


def test_values_that_no_wire_carries(write_rows, box_for, capsys):
    """Stops references of CodeUpdateArena that return objects of their own from failing for that."""
    code = "import colorsys\nclass Colour:\n    luma = colorsys.rgb_to_yiq(255, 0, 0, scale=255)[0]\nluma = lambda: Colour()"
    row = arena_rows("flat")[0] | {
        "ref_solution": code,
        "unit_tests": "def test():\n    assert 0.2 < luma().luma < 0.4\n",
    }
    found = tasks.load("codeupdatearena", write_rows([row]))
    assert eval.references(found, box_for(found)) == 0
    assert "1 of 1 pass, 0 without the update; 1 passes were judged in process" in capsys.readouterr().out


def test_arena_from_end_to_end(command, write_rows, box_for, monkeypatch, tmp_path):
    """Stops verdicts that end up with the wrong sample, or figures that are not those of the log."""
    path = write_rows(arena_rows("flat"), "arena.jsonl")
    box_for(tasks.load("codeupdatearena", path)).close()
    knows = "def luma(r, g, b):\n    return (0.3 * r + 0.59 * g + 0.11 * b) / 255"
    texts = {
        "p0": [answer(SOLVED["ref_solution"]), answer(knows), "?"],
        "p1": [answer("def luma():"), "?", answer(knows)],
    }
    write = lambda model, tokenizer, batch, seed, args: [
        {"problem": problem.name, "sample": j, "tokens": 1, "cut": False, "completion": text}
        for problem, _ in batch
        for j, text in enumerate(texts[problem.name])
    ]
    monkeypatch.setattr(eval, "complete", write)
    assert eval.main(command("--task", "codeupdatearena", "--data", path, "--k", "1", "2")) == 0
    result = json.loads((tmp_path / "run/codeupdatearena/table.json").read_text())
    means = {name: values[0] for name, values in result["table"]["all"].items() if name != "problems"}
    assert means == pytest.approx({"pass@1": 3 / 6, "pass@2": 5 / 6, "UPass@1": 1 / 6, "UPass@2": 2 / 6,
        "format": 4 / 6, "no_code": 2 / 6, "cut": 0})  # fmt: skip
    assert result["statuses"] == {"pass": 3, "no code": 2, "fail": 1}


def test_humaneval_in_the_sandbox(write_rows, box_for, capsys):
    """Stops a reference that fails, an empty body that passes, and floats that must agree to the last bit."""
    bare = {k: v for k, v in HUMAN.items() if k != "test"}
    roots = ROOTS | {"base_input": [[[3, 2]]], "plus_input": [[[-1, 4]]], "atol": 1e-4}
    found = tasks.load("humaneval", write_rows([HUMAN])) + tasks.load(
        "humaneval+", write_rows([bare | PLUS, roots])
    )
    box = box_for(found)
    assert eval.references(found, box) == 0
    assert "3 of 3 pass, 0 with an empty body" in capsys.readouterr().out
    assert eval.judge(found[0], answer("def double(x):\n    return math.fsum([x, x])"), box)[
        "passed"
    ]  # prompt's import
    judged = lambda problem, body: eval.judge(problem, answer(body), box)["passed"]
    assert judged(found[1], "def double(x):\n    return x * 2.0000000001")
    assert not judged(found[1], "def double(x):\n    return x * 2 + 1e-3")
    assert not judged(found[1], "def double(x):\n    return 2 * x if x == 2 else 0")
    assert not judged(found[1], "def double(x):\n    return str(2 * x)")
    assert judged(found[2], "def find_zero(xs):\n    return -xs[0] / xs[1] + 1e-6")
    assert not judged(found[2], "def find_zero(xs):\n    return 7.0") and not judged(found[0], "return 2 * x")


# ------------------------------------------------------------------------- runs


@pytest.fixture
def command(tmp_path, checkpoints, write_rows, rows):
    """command(*more): the arguments of a small evaluation into tmp_path/run."""
    fixed = ["--model", checkpoints["qwen2"], "--data", write_rows(rows), "--max-new-tokens", "8", "--batch", "2"]
    return lambda *more, output="run": [*fixed, "--output", str(tmp_path / output), "--num-samples", "3", *more]


def log_of(directory):
    """{(problem, sample): row} of a finished evaluation; no figure of a sample may have been logged twice."""
    merged = {}
    for path in directory.glob("migration/samples*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            known = merged.setdefault((row["problem"], row["sample"]), {})
            assert not known.keys() & row.keys() - {"problem", "sample"}, "sampled or judged twice"
            known.update(row)
    return merged


def test_run_directory(command, tmp_path, capsys):
    """Stops an evaluation that leaves less behind than it promises, or samples that are all the same."""
    assert eval.main(command("--k", "1", "2")) == 0
    out, path = capsys.readouterr().out, tmp_path / "run" / "migration"
    assert {file.name for file in path.iterdir()} == {"config.json", "samples.jsonl", "table.json", "table.md"}
    log, table = log_of(tmp_path / "run"), json.loads((path / "table.json").read_text())
    assert log.keys() == {(str(i), j) for i in range(6) for j in range(3)}
    assert all(
        isinstance(row["completion"], str) and row["tokens"] <= 8 and row["passed"] is False for row in log.values()
    )
    assert len({row["completion"] for row in log.values()}) > 12
    assert table["table"]["all"].keys() == {
        "problems", "pass@1", "pass@2", "es_star", "em_star", "stale", "format", "no_code", "cut"}  # fmt: skip
    assert table["table"]["all"]["cut"][0] == np.mean([row["cut"] for row in log.values()]) > 0.5
    assert json.loads((path / "config.json").read_text())["num_samples"] == 3
    cells = [cell.strip() for line in (path / "table.md").read_text().split("\n") for cell in line.split("|")]
    assert all(cell.strip("-").replace("\\", "") in out for cell in cells)
    assert max(len(line) for line in out.split("\n") if line.startswith("|")) <= 100


def test_killed_runs_go_on(command, tmp_path, monkeypatch):
    """Stops a resumed run that samples or judges twice, chokes on a torn row, or ends with other samples."""
    assert eval.main(command(output="whole")) == 0
    complete, judge, calls = eval.complete, eval.judge, Counter()

    def kill(at):
        def killed(*args):
            calls["batches"] += 1
            if calls["batches"] == at:
                raise KeyboardInterrupt
            return complete(*args)

        monkeypatch.setattr(eval, "complete", killed)

    monkeypatch.setattr(eval, "judge", lambda *args: calls.update(judged=1) or judge(*args))
    kill(3)
    with pytest.raises(KeyboardInterrupt):
        eval.main(command())
    log = tmp_path / "run" / "migration" / "samples.jsonl"
    torn = "completion" in json.loads(log.read_bytes().splitlines()[-1])  # else it is a verdict
    log.write_bytes(log.read_bytes()[:-15])
    kill(None)
    assert eval.main(command()) == 0
    assert calls["batches"] == 3 + 1 + torn and calls["judged"] == 18 + (not torn)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert (log.parent / "table.md").read_text() == (tmp_path / "whole/migration/table.md").read_text()
    monkeypatch.setattr(loading, "load_model", None)  # nothing is left that needs it
    done = calls.copy()
    assert eval.main(command("--k", "3")) == 0 and calls == done


def test_ranks_share_the_work(command, tmp_path, monkeypatch):
    """Stops samples that hang on the number of ranks, prompts that two ranks sample, or none."""
    assert eval.main(command(output="whole")) == 0
    found = tasks.load("migration", command()[3])
    for rank in (1, 0):
        monkeypatch.setattr(eval, "RANK", rank)
        monkeypatch.setattr(eval, "WORLD", 2)
        args = eval.parse(command())
        directory = tmp_path / "run" / "migration"
        directory.mkdir(parents=True, exist_ok=True)
        eval.evaluate(found, directory, None, args)
    assert {path.name for path in directory.iterdir()} == {"samples.jsonl", "samples-1.jsonl"}
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_sampling_settings_arrive(command, tmp_path):
    """Stops a top-p, temperature or seed that is only written down."""
    for output, more in {
        "sharp": ["--top-p", "1e-9"],
        "cold": ["--temperature", "0"],
        "other": ["--seed", "7"],
    }.items():
        assert eval.main(command(*more, output=output)) == 0
    texts = {
        name: [row["completion"] for row in log_of(tmp_path / name).values()] for name in ("sharp", "cold", "other")
    }
    assert texts["sharp"] == texts["cold"] and len(set(texts["cold"])) <= 6 < len(set(texts["other"]))


@pytest.mark.parametrize("late", [False, True])
def test_a_judge_that_fails_ends_the_run(command, monkeypatch, late):
    """Stops a broken sandbox, or a full disk, from going unnoticed in a thread while the GPU works on."""
    met, judge, complete, calls = threading.Event(), eval.judge, eval.complete, []

    def broken(*args):
        if not late or len(calls) == 6:
            met.set()
            raise ZeroDivisionError
        return judge(*args)

    def wait(*args):
        calls.append(0)
        assert late or len(calls) == 1 or met.wait(60)
        return complete(*args)

    monkeypatch.setattr(eval, "judge", broken)
    monkeypatch.setattr(eval, "complete", wait)
    with pytest.raises(ZeroDivisionError):
        eval.main(command("--batch", "1"))
    assert (len(calls) == 6) == late


def test_full_disk(command, tmp_path, monkeypatch):
    """Stops a traceback, and completions that are lost with the disk full."""

    def full(path, mode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(eval, "open", full, raising=False)
    with pytest.raises(BadInput, match="cannot write .*samples.jsonl: No space left.*same command again"):
        eval.main(command())
    monkeypatch.undo()
    assert eval.main(command()) == 0


@pytest.mark.parametrize("changes, word", [
    *[([flag, value], flag) for flag in ("--num-samples", "--max-new-tokens", "--batch") for value in ("0", "two")],
    (["--top-p", "0"], "--top-p"), (["--top-p", "1.1"], "--top-p"), (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"), (["--seed", "-1"], "--seed"), (["--k", "4"], "--k 4"),
    (["--k", "0"], "--k 0"), (["--task", "magic"], "magic"), (["--data", "none.jsonl"], "none.jsonl"),
    (["--data", "", "--task", "humaneval"], "openai/human-eval"), (["--references"], "--references"),
    (["--task", "humaneval+", "--no-update"], "--no-update"), (["--model", "none"], "no directory 'none'"),
    (["--adapter", "none"], "none"), (["--compare", "none"], "none"), (["--speed", "9"], "--speed"),
])  # fmt: skip
def test_bad_settings(command, tmp_path, monkeypatch, capfd, changes, word):
    """Stops a setting that makes no sense from costing an hour before it is noticed, or a traceback."""
    monkeypatch.setattr("sys.argv", ["eval.py", *command(*changes)])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(eval.main)
    stderr = capfd.readouterr().err.split("\r")[-1]
    assert stop.value.code == 2 and word in stderr and not list(tmp_path.glob("run/*/samples*"))
    assert re.search(r"^error: .+\n$", stderr, re.MULTILINE) and "Traceback" not in stderr


def test_another_evaluation_is_not_mixed_in(command, checkpoints):
    """Stops samples of two models, seeds or data files under one name; an adapter trained anew is another one."""
    assert eval.main(command()) == 0
    for more, word in ((["--seed", "7"], "seed was 42"), (["--top-p", "1"], "top_p was 0.7"), (
        ["--model", checkpoints["llama"]], "model was"), (["--no-update"], "no_update was False")):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            eval.main(command(*more))
    os.utime(command()[3])
    with pytest.raises(BadInput, match="files of data was .*give another --output"):
        eval.main(command())


def test_defaults_are_the_embedded_model_on_heldout_tasks():
    """Stops `python eval.py` from measuring on training data, and n, temperature and top-p other than the arena's."""
    args = eval.parse([])
    assert os.path.samefile(args.model, ROOT / "tiny") and os.path.samefile(args.data, ROOT / "tiny" / "heldout.jsonl")
    assert (args.num_samples, args.temperature, args.top_p, args.k, args.max_new_tokens) == (5, 0.8, 0.7, [1, 5], 64)
    args = eval.parse(["--model", "some/model", "--task", "codeupdatearena", "--num-samples", "1"])
    assert (args.data, args.k, args.max_new_tokens) == ("leo-liuzy/CodeUpdateArena", [1], 1024)


# ------------------------------------------------------------------------- the real benchmarks


def shared(name):
    path = SHARED / "data" / name
    return str(path) if path.exists() else pytest.skip(f"needs ../shared/data/{name}")


def test_real_humaneval(box_for, capsys):
    """Stops a HumanEval that is not HumanEval: 164 canonical solutions pass, 164 empty bodies fail."""
    found = tasks.load("humaneval", shared("HumanEval.jsonl.gz"))
    assert eval.references(found, box_for(found)) == 0
    assert "references: 164 of 164 pass, 0 with an empty body" in capsys.readouterr().out


def test_real_arena(box_for, capsys, tokenizer):
    """Stops a loader that loses problems or tests; some references run, with the update and without."""
    found = tasks.load("codeupdatearena", shared("codeupdatearena-part.jsonl"))
    assert len(found) == 296 and sum(len(problem.tests) for problem in found) == 1863
    assert all(tasks.encode(problem, tokenizer) for problem in found)
    some = [p for p in found if p.package in ("math", "re", "itertools") and "scipy" not in p.setup][::10]
    assert eval.references(some, box_for(some)) == 0
    assert f"references: {len(some)} of {len(some)} pass, 0 without" in capsys.readouterr().out
