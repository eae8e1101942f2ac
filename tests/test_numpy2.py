"""tasks/numpy2: its programs are run under the installed NumPy; their notes; the task's columns.

The expected values in numpy2.jsonl come from the old programs under NumPy 1.26.4. To check that
again, run them in an environment with that version.
"""

import difflib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SHARED, cells

import data
import eval
import reward
import tasks
import tasks.answers
import tasks.judging
import tasks.migration
import tasks.numpy2
from lib.config import BadInput

ROWS = [json.loads(line) for line in Path(tasks.numpy2.ROWS).read_text("utf-8").splitlines()]
BROKEN = [row for row in ROWS if row["group"] != "unrelated"]
UNRELATED = [row for row in ROWS if row["group"] == "unrelated"]


@pytest.fixture(scope="module")
def box():
    pytest.importorskip("sandbox")
    try:
        box = tasks.judging.open_sandbox(tasks.load("numpy2", tasks.numpy2.ROWS), unsafe=False)
    except BadInput as error:
        pytest.skip(str(error))
    with box:
        yield box


def run_all(box, jobs):
    with ThreadPoolExecutor(tasks.judging.JUDGES) as pool:
        return list(pool.map(lambda job: box.run(**job), jobs))


def answer(code):
    return f"\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


# ------------------------------------------------------------------------- the rows


def test_programs(box):
    """Stops an old program that still runs or fails for another reason than its removed names, a
    reference that fails, and a test that an empty program passes.
    """
    codes = [code for row in ROWS for code in (row["new_code"], row["old_code"])]
    codes += ["pass"] * len(UNRELATED)
    tests = [row["test"] for row in ROWS for _ in range(2)] + [row["test"] for row in UNRELATED]
    jobs = [{"code": code, "tests": [test]} for code, test in zip(codes, tests, strict=True)]
    verdicts = run_all(box, jobs)
    for i, row in enumerate(ROWS):
        new, old = verdicts[2 * i : 2 * i + 2]
        assert new.passed, (row["name"], new)
        assert old.passed == (row in UNRELATED), (row["name"], old)
        removed = row["removed"] or [""]
        assert any(name in old.reason for name in removed), (row["name"], old)
    assert not any(verdict.passed for verdict in verdicts[2 * len(ROWS) :])


def half_done(row):
    """The references of a row, each with one changed line, or block of lines, left as it was."""
    old, new = row["old_code"].split("\n"), row["new_code"].split("\n")
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if tag == "equal":
            continue
        if b - a != d - c:
            yield "\n".join(new[:c] + old[a:b] + new[d:])
            continue
        for i in range(b - a):
            yield "\n".join(new[: c + i] + [old[a + i]] + new[c + i + 1 :])


def test_half_a_migration_fails(box):
    """Stops a test that does not see one of the changes which the program needs."""
    jobs = []
    for row in BROKEN:
        jobs += [{"code": code, "tests": [row["test"]]} for code in half_done(row)]
    assert len(jobs) >= 100
    for job, verdict in zip(jobs, run_all(box, jobs), strict=True):
        assert not verdict.passed, job["code"]


def test_rows():
    """Stops a set that shrinks, or rows whose note and code do not tell how to fix the program."""
    assert len({row["name"] for row in ROWS}) == len(ROWS) == 80
    assert len(BROKEN) == 60 and len(UNRELATED) == 20
    assert Counter(row["group"] for row in BROKEN)["unseen"] >= 30
    assert Counter(row["kind"] for row in BROKEN)["rewrite"] >= 10
    assert len({name for row in BROKEN for name in row["removed"]}) >= 45
    for row in ROWS:
        example = data.read_example("", row)
        assert (example.dependency, example.new_version) == ("NumPy", "2.0")
        assert 5 <= len(example.old_code.split("\n")) <= 30 and not data.fault(example)
        assert tasks.migration.determined(example) or row in UNRELATED, row["name"]
    for row in BROKEN:
        removed = set(row["removed"])
        assert removed <= reward.words(row["update_info"]), row["name"]
        assert removed <= tasks.answers.identifiers(row["old_code"], "numpy"), row["name"]


def test_unrelated_notes_name_nothing_of_the_code():
    """Stops a note that could be read as asking for a change."""
    for row in UNRELATED:
        assert row["old_code"] == row["new_code"] and not row["removed"]
        used = tasks.answers.identifiers(row["old_code"], "numpy")
        assert not used & reward.words(row["update_info"]), row["name"]
        assert "np." in row["update_info"] or "ndarray." in row["update_info"]


def test_groups_match_the_training_notes():
    """Stops an "unseen" program whose removed name the paper's training data names."""
    path = SHARED / "data" / "recode-train-data.jsonl"
    if not path.exists():
        pytest.skip("needs ../shared/data/recode-train-data.jsonl")
    notes = [example.update_info for example in data.load_examples(str(path))]
    known = set().union(*map(reward.words, notes))
    for row in BROKEN:
        assert row["group"] == ("seen" if known & set(row["removed"]) else "unseen"), row["name"]


# ------------------------------------------------------------------------- the task


@pytest.mark.parametrize("code, count", [
    ("a = 1\nb = NEW(a)\nc = b\nd = c", 0),
    ("a = 1\nb = OLD(a)\nc = b\nd = c", 0),  # nothing is changed
    ("a = 1\nb = OTHER(a)\nc = b\nd = c", 0),  # the reference changes this line, too
    ("# new\na = 1\n\nb = NEW(a)  # b\nc = b\nd = c", 0),
    ("a = 1\nb = NEW(a)\nc = b + 1\nd = c", 1),
    ("x = 1\ny = NEW(x)\nz = y\nd = z", 3),
    ("import os\na = 1\nb = NEW(a)\nc = b\nd = c", 1),
    ("a = 1\nb = NEW(\n    a\n)\nc = b\nd = c", 2),
    ("b = NEW(a)", 3),  # the others are lost
])  # fmt: skip
def test_stray_lines(code, count):
    """Stops lines that the note asks to change, or comments, from counting as stray."""
    old = "a = 1\nb = OLD(a)  # old\nc = b\nd = c"
    example = SimpleNamespace(old_code=old, new_code=old.replace("OLD", "NEW"))
    assert tasks.migration.stray_lines(example, code) == count


def test_stray_lines_of_a_copy():
    """Stops an untouched program from counting as longer than a reference that is shorter."""
    old = "a = f(\n    1\n)\nb = a"
    example = SimpleNamespace(old_code=old, new_code="a = g(1)\nb = a")
    assert tasks.migration.stray_lines(example, old) == 0


def test_prompt_is_that_of_training(tokenizer):
    """Stops another prompt than training's, a need for --data, and a note with --no-update."""
    source = eval.parse(["--task", "numpy2"]).data
    found = tasks.load("numpy2", source)
    assert [problem.name for problem in found] == [row["name"] for row in ROWS]
    example = data.read_example("", ROWS[0])
    assert found[0].encode(tokenizer) == data.encode_prompt(example, tokenizer)
    bare = tasks.load("numpy2", source, no_update=True)[0]
    assert bare.example.update_info == "" and bare.example.old_code == example.old_code


def test_an_evaluation(box, checkpoints, write_rows, tmp_path, monkeypatch, capsys):
    """Stops groups that are mixed, answers that are not run, and references that are not judged."""
    few = []
    for group in ("seen", "unseen", "unrelated"):
        few += [row for row in ROWS if row["group"] == group][:2]
    source = write_rows(few)
    assert eval.main(["--task", "numpy2", "--data", source, "--references"]) == 0
    assert "6 of 6 pass, 0 of the controls" in capsys.readouterr().out
    texts = {}
    for row in few:
        spoilt = "import math\n" + row["new_code"]
        texts[row["name"]] = [answer(row["new_code"]), answer(row["old_code"]), answer(spoilt), ""]

    def complete(model, tokenizer, batch, args):
        fixed = {"tokens": 1, "cut": False}
        return [
            {"problem": problem.name, "sample": j, "completion": text} | fixed
            for problem, *_ in batch for j, text in enumerate(texts[problem.name])
        ]  # fmt: skip

    monkeypatch.setattr(eval, "complete", complete)
    monkeypatch.setattr(tasks.judging, "open_sandbox", lambda found, unsafe: box)
    args = ["--task", "numpy2", "--data", source, "--model", checkpoints["qwen2"], "--num-samples"]
    assert eval.main([*args, "4", "--k", "1", "--output", str(tmp_path / "run")]) == 0
    table = json.loads((tmp_path / "run/numpy2/table.json").read_text())["table"]
    for group, passed in (("seen", 0.5), ("unseen", 0.5), ("unrelated", 0.75)):
        assert table[group]["problems"] == 2 and table[group]["pass@1"][0] == passed
        assert table[group]["stray_lines"][0] == pytest.approx(1 / 3)  # "" has no code
    assert table["unrelated"]["unchanged"][0] == 0.5 and "unchanged" not in table["seen"]
    head = (tmp_path / "run/numpy2/table.md").read_text().splitlines()[0]
    assert cells(head)[1:] == ["all (6)", "seen (2)", "unseen (2)", "unrelated (2)"]
