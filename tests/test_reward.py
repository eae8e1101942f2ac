"""The reward, against the defects of the released one, values by hand and independent oracles.

golden_rewards.json holds what the released code itself gives. It was made once, by calling its
es_star, em_star and format_reward (with rapidfuzz) on completion(kind, i, row) for every sixth row
i of the real data set that has old code and for every kind in KINDS; a case in which it raises is
null. The values are rounded to 11 digits: {"row": [[es_star, em_star, format] of each kind]}.
"""

import ast
import io
import json
import random
import time
import tokenize
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import reward
import tasks.migration
from conftest import SHARED, fault_in_real_md

REAL = SHARED / "data" / "recode-train-data.jsonl"
needs_data = pytest.mark.skipif(not REAL.is_file(), reason="the real data set is not there")


def answer(code, thought="so."):
    """A well-formed completion whose code is `code`."""
    return f" {thought}\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


def test_more_than_ten_strings():
    """Placeholder 1 is replaced inside placeholder 10, so a perfect answer with 12 strings earns
    -2.
    """
    code = "\n".join(f"x{i} = 'text {i}'" for i in range(12))
    assert reward.strip_comments(code) == code and reward.score(answer(code), code) == 3.0


def test_apostrophe_in_comment():
    """An apostrophe in a comment opens a string for the released code, which swallows what follows.
    """
    target = "x = 1\ny = 'a'"
    assert reward.strip_comments("x = 1  # don't\ny = 'a'") == target
    assert reward.score(answer("x = 1  # don't\ny = 'a'"), target) == 3.0
    assert reward.em_star(answer("x = 1  # it's\nwrong()  # isn't it"), "x = 1") == -1.5


def test_blanks_before_comment():
    """A line that is perfect but for its comment loses reward by the blanks that stood before it.
    """
    assert reward.strip_comments("x = 1  # one\n\ty = 2 \t # two") == "x = 1\n\ty = 2"
    assert reward.score(answer("x = 1  # one\ny = 2"), "x = 1\ny = 2") == 3.0
    assert reward.em_star(answer("x = 1\ny = 2"), "x = 1   # one\ny = 2") == 2.0


def test_nothing_to_compare_and_unparsable():
    """Two empty programs divide by zero; a NUL, deep nesting or a huge literal ends the training
    run.
    """
    assert reward.em_star(answer("# todo"), "# nothing") == 2.0
    assert reward.score(answer("# todo"), "# nothing") == 3.0
    for code in (
        "x = '\0'",
        "-" * 40_000 + "1",
        "lambda:" * 6_000 + "1",
        "x = '\ud800'",
        "(" * 100_000,
        "9" * 10**6,
    ):
        assert (
            reward.es_star(answer(code), "x = 1") == reward.em_star(answer(code), "x = 1") == -2.0
        )


def test_code_smuggled_through_the_think_block():
    """The first fence anywhere counts, so the right code in the thoughts pays for an empty answer.
    """
    assert (
        reward.score("```python\nx = 1\n```\n</think>\n<answer>\n</answer>", "x = 1") == 1.0 - 2.0
    )
    assert (
        reward.score(answer("y = 2", thought="```python\nx = 1\n```"), "x = 1")
        == 1.0 + 3.5 * 3 / 5 - 1.5
    )
    assert reward.em_star(answer("x = 1", thought="```python\ny = 2\n```"), "x = 1") == 2.0
    assert reward.em_star(answer("y = 2\n```\nor rather\n```python\nx = 1"), "x = 1") == 2.0


def test_total_is_a_number():
    """The released DAPO glue adds two lists and hands over [1.0, 2.0] where 3.0 is meant."""
    for correctness, total in {"es_star": 3, "em_star": 3, "es": 2, "em": 2, "none": 1}.items():
        value = reward.score(answer("x = 1"), "x = 1", correctness)
        assert isinstance(value, float) and value == total


def test_second_answer_block():
    """Answering twice is well-formed for the released code, which pays a model that repeats itself.
    """
    twice = answer("x = 1") + "\n<answer>\n```python\nx = 2\n```\n</answer>"
    assert reward.format_reward(twice) == -1.0
    assert reward.em_star(twice, "x = 1") == 2.0 and reward.em_star(twice, "x = 2") == -1.5


def brute_force(a, b):
    """Edit distance by the textbook's dynamic programme."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_levenshtein_brute_force():
    """A wrong carry or a lost bit gives wrong rewards on some pair: empty, repeated, unicode or
    long.
    """
    rng = random.Random(0)
    alphabets = [
        "a",
        "ab",
        "abc \n",
        "äß中\U0001f600\U0001f601x",
        "\0\ud800e\u0301é",
        "def foo(x): return",
    ]
    lengths = (
        [[0, 1, 2, 3, 8, 15, 16, 17, 31, 33]] * 3000
        + [[0, 60, 63, 64, 65]] * 150
        + [[290, 300, 310]] * 20
    )
    for choice in lengths:
        letters = rng.choice(alphabets)
        a, b = ("".join(rng.choices(letters, k=rng.choice(choice))) for _ in "ab")
        assert reward.levenshtein(a, b) == reward.levenshtein(b, a) == brute_force(a, b), (a, b)


def test_levenshtein_rapidfuzz():
    """An error that shows only beyond the lengths which brute force can check."""
    oracle = pytest.importorskip("rapidfuzz.distance.Levenshtein").distance
    rng = random.Random(1)
    for _ in range(60):
        a = "".join(rng.choices("abcdefgh_ =()\n中\U0001f600", k=rng.randrange(1400, 1600)))
        letters = [rng.choice(["", char, char, char, char + "z", "y"]) for char in a]
        b = "".join(letters[rng.randrange(40) :])
        assert reward.levenshtein(a, b) == oracle(a, b)


def test_format_reward():
    """A malformed completion that passes, or a good one that fails, is a reward for nothing."""
    good = [
        "a</think>\n<answer>b</answer>",
        "</think><answer></answer>",
        "a < b</think> \n <answer>\nb\n</answer> \n",
    ]
    bad = [
        "", "a", "a</think>", "a</think>b", "<answer>b</answer>", "a<answer>b</answer></think>",
        "a</think><answer>b",
        "a</think>b</answer>", "a</think>so<answer>b</answer>", "a</think><answer>b</answer>so",
        "a</THINK><answer>b</answer>", "<think>a</think><answer>b</answer>",
        "a</think></think><answer>b</answer>",
        "a</think><answer><answer>b</answer>", "a</think><answer>b</answer></answer>",
        "a</think></answer><answer>",
        "a</think><answer>b</answer><answer>c</answer>",
        "a</think><answer><think>b</think></answer>",
        "<answer>a</answer></think><answer>b</answer>",
    ]  # fmt: skip
    rewards = {text: reward.format_reward(text) for text in good + bad}
    assert rewards == dict.fromkeys(good, 1.0) | dict.fromkeys(bad, -1.0)


@pytest.mark.parametrize(
    "completion, es, em, es_star, em_star, form",
    [
        (answer("x = 12"), 1, 1, 2, 2, 1),
        (answer("x = 1"), 5 / 6, 0, 3.5 * 5 / 6 - 1.5, -1.5, 1),  # one insertion
        (answer("x = ("), 4 / 6, 0, -2, -2, 1),  # similar, but no Python
        (answer("print()"), 0, 0, -1.5, -1.5, 1),
        (answer("# so\n\nx = 12\n\n"), 1, 1, 2, 2, 1),
        ("so</think><answer>x = 12</answer>", 0, 0, -2, -2, 1),  # no fence
        ("so</think>\n```python\nx = 12\n```", 1, 1, 2, 2, -1),  # no answer tags
        ("so\n```python\nx = 12\n```", 0, 0, -2, -2, -1),  # never stopped thinking
        (answer("x = 12\n" + "#" * reward.MAX_CODE), 0, 0, -2, -2, 1),  # too long to be an answer
        ("</think><answer>```python\n```\n```python\nx = 12\n```</answer>", 1, 1, 2, 2, 1),
        ("</think><answer>```python\nx = 12\n```\n```python\n```</answer>", 0, 0, -1.5, -1.5, 1),
    ],
)
def test_values_by_hand(completion, es, em, es_star, em_star, form):
    """A slip in eq. 1 to 4, or a rate that pays for code that does not parse."""
    correctness = {"es": es, "em": em, "es_star": es_star, "em_star": em_star, "none": 0}
    correctness["gain"] = -2 if es == 5 / 6 else em_star  # a copy; the edit is one character
    correctness["strict"] = correctness["gain"]
    assert correctness.keys() == reward.CORRECTNESS.keys()
    for name, value in correctness.items():
        example = data.Example("lib", "2", "", "note", "x = 1", "x = 12")
        graded = reward.grade(completion, example)
        assert reward.CORRECTNESS[name](graded, example) == pytest.approx(value, abs=1e-12)
        assert reward.total(graded, example, name) == pytest.approx(form + value, abs=1e-12)
        if name not in ("gain", "strict"):  # without old code its edit is the whole reference
            score = reward.score(completion, "x = 12", name)
            assert score == pytest.approx(form + value, abs=1e-12)
    assert reward.score(completion, "x = 12") == pytest.approx(form + es_star, abs=1e-12)


def test_stale():
    """An unchanged task would count as stale although its old code is the right answer."""
    update = SimpleNamespace(old_code="old()", new_code="new()")
    assert reward.grade(answer("old()  # as ever"), update).stale == 1.0
    assert reward.grade(answer("new()"), update).stale == reward.grade("old()", update).stale == 0.0
    same = SimpleNamespace(old_code="same()", new_code="same()  # still")
    assert reward.grade(answer("same()"), same).stale == 0.0


def gain_by_definition(code, example):
    """OBEY's gain from a Levenshtein distance that is not ours: the plain dynamic programme."""
    def distance(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            last, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
        return row[-1]

    return 1 - distance(code, example.new_code) / distance(example.old_code, example.new_code)


@pytest.mark.parametrize(
    "code, expected",
    [
        ("np.isin(a, b)", 2.0),  # the reference
        ("np.in1d(a, b)", -2.0),  # a copy
        ("np.in1d(a, b)  # np.isin", -2.0),  # a copy with a comment
        ("np.isi(a, b)", None),  # most of the edit
        ("np.in1d(a, b, True)", -1.5),  # a step away earns no less than no step
        ("np.isin(a, b", -2.0),  # does not parse
    ],
)
def test_gain(code, expected):
    """Stops a copy, or an answer that is merely similar, from earning more than the format."""
    example = SimpleNamespace(old_code="np.in1d(a, b)", new_code="np.isin(a, b)")
    graded = reward.grade(answer(code), example)
    if expected is None:
        expected = 3.5 * gain_by_definition(code, example) - 1.5
        assert -1.5 < expected < 2.0
    assert reward.total(graded, example, "gain") == pytest.approx(1.0 + expected)


def test_gain_where_no_change_is_asked_for():
    """Stops a right copy from being punished: without a requested edit gain is ES*."""
    same = SimpleNamespace(old_code="f(x)", new_code="f(x)  # as before")
    for code in ("f(x)", "f(y)", "f("):
        graded = reward.grade(answer(code), same)
        assert reward.total(graded, same, "gain") == reward.total(graded, same, "es_star")
    assert reward.total(reward.grade("no code", same), same, "gain") == -3.0


def test_strict_where_no_change_is_asked_for():
    """Stops a needless edit from earning more than a needless copy, or strict from being lenient
    with a copy where a change is asked for.
    """
    same = SimpleNamespace(old_code="f(x)", new_code="f(x)  # as before")
    for code, expected in (("f(x)", 3.0), ("f(x)  # why not", 3.0), ("f(y)", -1.0), ("f(", -1.0)):
        assert reward.total(reward.grade(answer(code), same), same, "strict") == expected
    update = SimpleNamespace(old_code="f(x)", new_code="g(x)")
    for code in ("f(x)", "g(x)", "g(y)", "f("):
        graded = reward.grade(answer(code), update)
        assert reward.total(graded, update, "strict") == reward.total(graded, update, "gain")


@pytest.mark.parametrize(
    "note, completion, obeys",
    [
        ("Use isin and assume_unique.", answer("np.isin(a, assume_unique=True)"), 1.0),
        ("Use isin and assume_unique.", answer("np.isin(a)"), 0.0),  # one of two names
        ("Use isin.", answer("np.in1d(a)  # isin"), 0.0),  # only in a comment
        ("Use isin.", answer("np.isin2(a)"), 0.0),  # a longer word
        ("Use isin.", answer("np.isin(a"), 0.0),  # does not parse
        ("Use isin.", "isin", 0.0),  # no code
        ("Use isin.", answer("isin"), 1.0),  # wrong, but it uses the name
        ("in1d was removed.", answer("np.in1d(a)"), None),  # names nothing new
        ("in1d was removed.", "no code", None),
    ],
)
def test_obeys(note, completion, obeys):
    """Stops `obeys` from counting comments, parts of words, or rows whose note names nothing."""
    new = "np.isin(a, assume_unique=True)  # faster"
    example = SimpleNamespace(old_code="np.in1d(a)", new_code=new, update_info=note)
    assert reward.grade(completion, example).obeys == obeys


@needs_data
def test_obeys_and_determined_on_the_real_held_out_rows(monkeypatch):
    """Stops another reading of the definitions: of 140 rows 82 name something, 52 are determined.

    Counted by another program before this one was written (numbers are words of a reference, too).
    """
    monkeypatch.setattr(data, "fault", fault_in_real_md)
    heldout = data.split_heldout("0.1", data.load_examples(str(REAL)), 42)[1]
    plain = reward.strip_comments
    change = [e for e in heldout if plain(e.old_code) != plain(e.new_code)]
    assert len(change) == 140
    assert sum(bool(reward.needed(e)) for e in change) == 82
    assert sum(tasks.migration.determined(e) for e in change) == 52


def test_strip_comments_keeps_strings():
    """A "#" or quote inside a string is taken for a comment or an end, and code disappears."""
    doc = [
        'x = "# no"',
        "x = '''a\n# b'''",
        "x = 'it\\'s # no'",
        'f"{x} # {y}"',
        'r"\\d" + "#"',
        '"""doc # s"""',
        "''",
    ]
    for code in doc:
        assert reward.strip_comments(code) == code
        assert reward.strip_comments(f'\n# \'\n\n  {code} \t# """\n\n') == code


@pytest.mark.parametrize(
    "code",
    [
        'f"{row["#name"]}"',  # the f-string's own quote
        "f'{a['it']}' + '#'",
        'f"{f"{f"#"}#"}#"',
        'rF"\\{row["#"]}#"',  # a backslash protects no brace
        't"{row["#"]}#"',
        'f"{"\\n#".join(x)}#"',
        'f"{{#}}{x}#"',
        'f"{{{x}}}#"',
        'f"{x:#x}#"',  # a format spec is text
        "f'{x:\">#10}#'",
        'f"{x!r:#>{w["#"]}}#"',
        'f"{x:{w:#x}#}#"',
        'f"{x=}#"',
        'f"{x != "#"}#"',
        'f"{ {"a": "#"}["a"] }#"',
        'f"{x["a":"#"]}#"',
        'f"{(lambda x: "#")(1)}#"',
        'f"\\N{NUMBER SIGN}#\\"#"',
        "f'''{x[\"'''\"]}#'''",
        "f'''{'''#'''}#'''",
        'y = x if"{#"else"}#"',  # no prefix
    ],
)
def test_strings_in_the_braces_of_f_strings(code):
    """A "#" in such a string cuts the line, and a wrong answer behind it is an exact match."""
    assert reward.strip_comments(f"{code}  # it's\ny = '#'  # \"") == f"{code}\ny = '#'"
    assert reward.em_star(answer(f"{code}.a  # {{"), f"{code}.b") < 0


@pytest.mark.parametrize("quote", ['"', "'", '"""', "'''"])
def test_comments_in_the_braces_of_f_strings(quote):
    """A comment in the braces of an f-string stays, or a quote in it ends the string."""
    code = f"f{quote}#{{\n  f(x,  # it's }} {quote}\n  y)  # : {{\n:#>{{  w  # w\n}}}}#{quote}  # z"
    bare = f"f{quote}#{{\n  f(x,\n  y)\n:#>{{  w\n}}}}#{quote}"
    assert reward.strip_comments(code) == bare


KINDS = ("exact", "old", "mutated", "comment lines", "truncated", "unfenced", "broken")


def real_rows():
    return [json.loads(line) for line in REAL.read_text().splitlines()]


def completion(kind, i, row):
    """The completion of a kind for row i of the data set."""
    code, place = row["old_code" if kind == "old" else "new_code"], i * 7919
    if kind == "mutated":
        place %= len(code)
        code = code[:place] + "abc_1"[i % 5] + code[place + 1 :]
    if kind == "comment lines":
        code = "\n\n".join(
            line if line.startswith(" ") else f"# note {i}\n{line}" for line in code.split("\n")
        )
    if kind == "broken":
        code += "\n)("
    if kind == "unfenced":
        return f"so</think><answer>{code}</answer>"
    text = answer(code)
    return text[: place % len(text)] if kind == "truncated" else text


@needs_data
def test_agreement_with_released_rewards():
    """A reward that differs from the paper's elsewhere than in its defects is another method."""
    golden = json.loads(Path(__file__).with_name("golden_rewards.json").read_text())
    rows, pairs = real_rows(), []
    for i, cases in golden.items():
        for kind, expected in zip(KINDS, cases, strict=True):
            text, target = completion(kind, int(i), rows[int(i)]), rows[int(i)]["new_code"]
            ours = (
                reward.es_star(text, target),
                reward.em_star(text, target),
                reward.format_reward(text),
            )
            pairs += [(ours, expected)] if expected else []
    agree = [sum(abs(a[k] - b[k]) < 1e-9 for a, b in pairs) / len(pairs) for k in range(3)]
    assert len(pairs) > 2000 and agree[0] >= 0.985 and agree[1] >= 0.985 and agree[2] == 1.0, agree


@needs_data
def test_strip_comments_agrees_with_tokenize():
    """A comment that stays, or code that goes, by the judgement of Python's own tokenizer on real
    code.
    """
    for code in (
        row[name] for row in real_rows() for name in ("old_code", "new_code") if row[name]
    ):
        if not reward.parses(code):
            continue
        lines = code.split("\n")
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                line, column = token.start
                lines[line - 1] = lines[line - 1][:column].rstrip(" \t")
        assert (
            reward.strip_comments(code) == "\n".join(line for line in lines if line.strip()).strip()
        )


@needs_data
def test_exact_copies_of_real_targets():
    """A real target whose perfect copy earns less than all teaches the model to avoid it."""
    parsed = 0
    for target in (row["new_code"] for row in real_rows()):
        try:
            ast.parse(target)
        except SyntaxError:
            continue
        parsed += 1
        assert (
            reward.es_star(answer(target), target) == reward.em_star(answer(target), target) == 2.0
        )
        assert reward.score(answer(target), target) == 3.0
    assert parsed == 1731


HOSTILE = {
    "NUL": "x = '\0'", "surrogates": "\ud800 = '\udfff\ud800'", "brackets": "(" * 100_000,
    "closed brackets": "[" * 100_000 + "]" * 100_000,
    "brackets below the limit": "[" * 24_000 + "]" * 24_000,
    "integer": "9" * 10**6, "integer below the limit": "9" * 49_000, "megabyte": "x" * 10**6,
    "triple quotes": "'''\\" * 250_000, "backslashes": '"""' + "\\" * 49_000,
    "quotes": "' \" \\" * 9_000,
    "blanks": " " * 49_000, "blanks, comments": " #" * 24_000, "tabs": "\t " * 10**6,
    "newlines": "\n" * 10**6,
    "unary": "-" * 49_000 + "1", "not": "not " * 12_000 + "1", "lambdas": "lambda:" * 7_000 + "1",
    "sum": "a+" * 24_000 + "a", "attributes": "a" + ".a" * 24_000,
    "conditions": "x if y else " * 4_000 + "z",
    "indents": "".join(" " * i + "if x:\n" for i in range(300)), "f-strings": "f'{" * 16_000,
    "fields": 'f"' + "{" * 49_000, "specs": "f'{a:" * 9_000, "names": 'f"' + "\\N{a" * 12_000,
    "lines": "x = 1\n" * 8_000, "powers": "2**" * 16_000 + "2", "answers": "<answer>" * 130_000,
    "ends": "</answer>" * 120_000, "thoughts": "</think>" * 130_000, "ticks": "`" * 10**6,
    "fences": "```python\n" * 100_000, "open fences": "```python\nx" * 9_000,
    "distinct letters": f"x = '{''.join(map(chr, range(65536, 114000)))}'",
}  # fmt: skip


@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completions(code):
    """A completion that raises or hangs ends a training run; a model writes any text."""
    target = "import mathlib\n" + "\n".join(f"x{i} = mathlib.double('{i}')" for i in range(60))
    for text in (answer(code), code, "so</think><answer>" + code, answer(target) + code):
        started = time.process_time()
        update = SimpleNamespace(old_code="old()", new_code=target)
        total, stale = reward.score(text, target), reward.grade(text, update).stale
        stripped = reward.strip_comments(text)
        assert time.process_time() - started < 1.0
        assert -3.0 <= total <= 3.0 and stale == 0.0 and isinstance(stripped, str)


@pytest.mark.slow
@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completions_take_little_memory(code):
    """A completion that eats the memory ends a training run."""
    target = "import mathlib\n" + "\n".join(f"x{i} = mathlib.double('{i}')" for i in range(60))
    tracemalloc.start()
    reward.score(answer(code), target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
