"""The reward: does the answer have the right form, and how close is its code to the reference?

    total = format + correctness, between -3 and 3                                       (eq. 1)

    format   +1   "<think>" + completion is one think block, then one answer block
             -1   anything else
    ES       1 - Levenshtein(a, b) / max(|a|, |b|)       edit similarity, in [0, 1]        (eq. 2)
    EM       1 if a == b else 0                          exact match
    ES*      -2.0 if there is no code or it does not parse, else 3.5 ES - 1.5             (eq. 3)
    EM*      -2.0 likewise, +2.0 if a == b, else -1.5                                     (eq. 4)

a and b are the answer's code and the reference, both without comments and blank lines. ES* is the
paper's reward; the others are its ablation. A completion is what the model wrote after the prompt's
open "<think>", so it starts inside the think block.

Where this differs from the released code, each with a test in tests/test_reward.py:
  1. Strings are never replaced by placeholders, so code with more than ten of them survives.
  2. An apostrophe inside a comment does not swallow the code after it.
  3. The blanks before a removed comment go with it.
  4. Two empty programs are equal (no division by zero); NUL bytes, deep nesting and huge literals
     count as code that does not parse instead of ending the training run.
  5. Only the answer's code counts (of several fences the last, see extract_code), so nothing can
     be smuggled in through the think block.
  6. The total is a number, never two lists added up.
  7. A second answer block is a format error: repeating oneself is not an answer.
"""

import ast
import re
import warnings

# A string literal (kept) or a comment with the blanks before it (dropped). The scan runs from left
# to right, so a quote in a comment and a "#" in a string are both seen for what they are. Every
# repetition is possessive (*+) and an unclosed string runs to its end of line or file, hence
# linear time on whatever a model writes.
TOKEN = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+(?:"""|\Z)|\'\'\'(?:[^'\\]|\\.|'(?!''))*+(?:\'\'\'|\Z)'''
    r"""|"(?:[^"\\\n]|\\.)*+"?|'(?:[^'\\\n]|\\.)*+'?|(?P<comment>[ \t]*+\#[^\n]*+)|[ \t]++""",
    re.DOTALL,
)
FENCE, END = "```python\n", "\n```"
MAX_CODE = 50_000  # characters; ten times what 1024 tokens of real code hold. Longer is no answer.


def strip_comments(code):
    """`code` without comments, blank lines and outer whitespace. Strings, docstrings too, stay.

    Never raises: what is not Python is treated as if it were. Linear in len(code).
    """
    code = TOKEN.sub(lambda m: "" if m["comment"] is not None else m[0], code)
    return "\n".join(line for line in code.split("\n") if line.strip()).strip()


def levenshtein(a, b):
    """Edit distance of two strings: insertions, deletions and substitutions, each at cost 1.

    One Python big integer holds a whole column of the dynamic programme as +1/-1 differences
    between neighbours (Myers 1999, in the form of Hyyrö 2003), so a character of `b` costs a
    handful of integer operations instead of len(a) steps. O(len(a) * len(b) / word size).
    """
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    a, b = a[start : len(a) - end], b[start : len(b) - end]  # a shared prefix or suffix costs nothing
    if not a or not b:
        return len(a) + len(b)
    if len(a) > len(b):
        a, b = b, a  # the shorter one spans the integers
    positions = {}  # character -> the bits of its places in a
    for i, char in enumerate(a):
        positions[char] = positions.get(char, 0) | 1 << i
    ones = (1 << len(a)) - 1
    up, down = ones, 0  # where a step down the column adds 1, where it takes 1 away
    for char in b:
        match = positions.get(char, 0)
        diagonal = ((((match & up) + up) ^ up) | match | down) & ones  # where the diagonal step is free
        right_up = ((down | (ones ^ (diagonal | up))) << 1 | 1) & ones  # steps to the right that add 1
        up, down = (up & diagonal) << 1 & ones | (ones ^ (diagonal | right_up)), right_up & diagonal
    return len(b) + up.bit_count() - down.bit_count()  # along the top row, then down the last column


def extract_code(completion):
    """The last python fence of the answer, stripped; None if there is none or it is over MAX_CODE.

    The answer is what follows <answer>; where that tag is missing (the format reward says so), what
    follows </think>. An unclosed think block has no answer, but for an <answer> tag inside it.
    """
    think, closed, tail = completion.partition("</think>")
    before, opened, answer = (tail if closed else think).partition("<answer>")
    if not opened:
        answer = before if closed else ""
    answer, code, start = answer.partition("</answer>")[0], None, 0
    while (start := answer.find(FENCE, start)) >= 0 and (end := answer.find(END, start + len(FENCE))) >= 0:
        code, start = answer[start + len(FENCE) : end], end + len(END)  # linear, where a regex would be quadratic
    return code.strip() if code is not None and len(code) <= MAX_CODE else None


def parses(code):
    """Whether Python's own parser takes `code`; True or False for any string at all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in the model's string is not our news
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # broken; NUL or surrogate; too deep
        return False
    return True


def format_reward(completion):
    """+1.0 if "<think>" + completion is one think block and then one answer block, else -1.0."""
    think, closed, rest = completion.partition("</think>")
    rest = rest.strip()
    well_formed = (
        closed
        and "<think>" not in think
        and rest.startswith("<answer>")
        and rest.endswith("</answer>")
        and rest.count("<answer>") == rest.count("</answer>") == 1
    )
    return 1.0 if well_formed else -1.0


def similarity(a, b):
    """Edit similarity of two strings, in [0, 1]; two empty ones are equal."""
    return 1.0 - levenshtein(a, b) / max(len(a), len(b), 1)  # eq. 2


def es(completion, target):
    """Edit similarity of the answer's code and `target`, in [0, 1]; 0.0 without code."""
    code = extract_code(completion)
    return 0.0 if code is None else similarity(strip_comments(code), strip_comments(target))


def em(completion, target):
    """1.0 if the answer's code equals `target` (comments and blank lines aside), else 0.0."""
    code = extract_code(completion)
    return float(code is not None and strip_comments(code) == strip_comments(target))


def es_star(completion, target):
    """The paper's correctness, in [-2, 2]: similarity, but only for code that parses."""
    code = extract_code(completion)
    return -2.0 if code is None or not parses(code) else 3.5 * es(completion, target) - 1.5  # eq. 3


def em_star(completion, target):
    """Exact match with the same penalty for code that does not parse: -2.0, -1.5 or 2.0."""
    code = extract_code(completion)
    return -2.0 if code is None or not parses(code) else 3.5 * em(completion, target) - 1.5  # eq. 4


CORRECTNESS = {"es_star": es_star, "em_star": em_star, "es": es, "em": em, "none": lambda completion, target: 0.0}


def score(completion, target, correctness="es_star"):
    """The total reward of one completion, a float; `correctness` is a key of CORRECTNESS."""
    return format_reward(completion) + CORRECTNESS[correctness](completion, target)  # eq. 1


def stale(completion, old_code, target):
    """1.0 if the answer repeats the old code although the update asks for a change, else 0.0."""
    return em(completion, old_code) if strip_comments(old_code) != strip_comments(target) else 0.0
