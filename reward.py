"""The reward: does the answer have the right format, and how close is its code to the reference?

    total = format + correctness, between -3 and 3                                        (eq. 1)

    format   +1 if "<think>" + completion is one think block, then one answer block, else -1
    ES       1 - Levenshtein(a, b) / max(|a|, |b|)      edit similarity, in [0, 1]        (eq. 2)
    EM       1 if a == b, else 0                        exact match
    ES*      3.5 ES - 1.5, or -2 without code that parses                                 (eq. 3)
    EM*      3.5 EM - 1.5, or -2 without code that parses                                 (eq. 4)
    gain     1 - Levenshtein(a, b) / Levenshtein(c, b)  share of the requested edit made  (eq. 5)
    gain*    3.5 max(gain, 0) - 1.5; -2 for a copy of c, and without code that parses     (eq. 6)
    strict*  gain*; where no change is asked for (b equals c) 2 for a copy of c, else -2  (eq. 7)

a, b and c are the answer's code, the reference and the old code, all without comments and blank
lines. ES* is the paper's correctness; ES, EM and EM* are its ablation. ES* gives a copy of the old
code a high reward; gain* is ES* with the zero moved, so that a copy earns nothing. Where no change
is asked for, gain* is ES*, and strict* penalises a needless edit as much as a needless copy. A
completion follows the prompt's open "<think>", so it starts inside the think block.

Exact match hardly sees whether a model follows the note, because most references hold more than the
note says. So an answer is also graded by the names that it uses; no reward looks at this:

    needed   (words(b) - words(c)) & words(note)        the new names that the note gives
    obeys    1 if the code parses and has every needed word, else 0; None if none is      (eq. 8)

A reward of your own is a function of a Grade and the whole example, with a name in CORRECTNESS.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

# A model writes any text, so every search takes linear time: *+ and ++ never backtrack.
UNTAGGED = "(?:[^<]++|<(?!/?(?:think|answer)>))*+"
FORM = re.compile(rf"{UNTAGGED}</think>\s*<answer>{UNTAGGED}</answer>\s*")
FENCE = "```python\n"
FENCE_END = "\n```"
FENCED = re.compile(rf"{FENCE}(?:(.*?)\n)??```", re.DOTALL)  # may be empty
MAX_CODE = 50_000  # characters, ten times what 1024 tokens of real code hold; longer is no answer
# Strings, comments with the blanks before them, other blanks, and what matters inside an f-string's
# braces. The scan runs from left to right, so a quote in a comment and a "#" in a string are
# recognised for what they are. An unclosed string runs to the end of its line or file.
TOKEN = re.compile(
    r"""
      (?<!\w) (?:[fFtT][rR]?|[rR][fFtT]) (?P<quote> "{3}|'{3}|"|')
    | "{3} (?:[^"\\]|\\.|"(?!""))*+ (?:"{3}|\Z)
    | '{3} (?:[^'\\]|\\.|'(?!''))*+ (?:'{3}|\Z)
    | " (?:[^"\\\n]|\\.)*+ "?
    | ' (?:[^'\\\n]|\\.)*+ '?
    | (?P<comment> [ \t]*+ \#[^\n]*+)
    | [ \t]++
    | (?P<sign> [][(){}:])
    """,
    re.DOTALL | re.VERBOSE,
)
# The text of an f-string and the sign after it. A backslash protects a quote, but a brace only in
# \N{BULLET}.
TEXT = re.compile(
    r"""(?:[^\\{}"'\n]|\\N\{[\w -]*+\}|\\[^{}]|\\)*+(?P<sign>\{\{|[{}\n]|"{3}|'{3}|"|')"""
)


def format_reward(completion):
    """+1.0 if "<think>" + completion is one think block and then one answer block, else -1.0."""
    return 1.0 if FORM.fullmatch(completion) else -1.0


def extract_code(completion):
    """The last python fence of the answer, stripped; None if there is none or it exceeds MAX_CODE.

    The answer is what follows <answer>; without that tag (a format error), what follows </think>.
    An unclosed think block has no answer, unless there is an <answer> tag inside it.
    """
    answer = completion.split("</think>", 1)[-1]
    if "<answer>" in answer:
        answer = answer.split("<answer>", 1)[1]
    elif "</think>" not in completion:
        return None
    answer = answer.split("</answer>", 1)[0]
    # Fences that begin after this are not closed; without them the search takes linear time.
    end = answer.rfind(FENCE_END) + len(FENCE_END)
    codes = FENCED.findall(answer[:end])
    if not codes or len(codes[-1]) > MAX_CODE:
        return None
    return codes[-1].strip()


def parses(code):
    """Whether Python's own parser accepts `code`: True or False for any string."""
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes in the model's strings
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # broken; NUL; too deep
        return False
    return True


def comments(code):
    """Yield (start, end) of every comment in `code`, any string, with the blanks before it.

    The braces of an f-string hold code, in which there may be comments and, since Python 3.12, the
    f-string's own quote. A format spec is text again.
    """
    place = 0
    opened = [("code", "")]  # and then (text, field, bracket or spec; the quote of its f-string)
    while True:
        kind, quote = opened[-1]
        text = kind in ("text", "spec")
        match = TEXT.match(code, place) if text else TOKEN.search(code, place)
        if not match:
            return
        place = match.end()
        sign = match["sign"]
        if text:
            if sign.startswith(quote) or (sign == "\n" and len(quote) == 1):
                place = match.start("sign") + len(quote)
                while opened.pop()[0] != "text":  # the string ends, whatever is open in it
                    pass
            elif sign == "{":
                opened.append(("field", quote))
            elif sign == "}" and kind == "spec":
                opened.pop()
        elif match["comment"]:
            yield match.span()
        elif match["quote"]:
            opened.append(("text", match["quote"]))
        elif sign and kind != "code":
            if sign in "([{":
                opened.append(("bracket", quote))
            elif sign == ":" and kind == "field":
                opened[-1] = ("spec", quote)
            elif sign == "}" or (sign != ":" and kind == "bracket"):
                opened.pop()


def strip_comments(code):
    """`code`, any string, without comments, blank lines and outer whitespace; docstrings stay."""
    kept = ""
    place = 0
    for start, end in comments(code) if "#" in code else ():
        kept += code[place:start]
        place = end
    lines = (kept + code[place:]).split("\n")
    return "\n".join(line for line in lines if line.strip()).strip()


def levenshtein(a, b):
    """Edit distance of two strings: insertions, deletions and substitutions cost 1 each.

    Bit-parallel (Myers 1999, in Hyyrö's form of 2003): one Python integer holds a whole column of
    the dynamic programme as +1/-1 differences between neighbours, so a character of `b` costs a
    few integer operations. O(len(a) * len(b) / word size).
    """
    a, b = sorted([a, b], key=len)  # the shorter one spans the integers
    positions = {}  # character -> bit mask of its positions in a
    for i, char in enumerate(a):
        positions[char] = positions.get(char, 0) | 1 << i
    ones = (1 << len(a)) - 1
    up = ones  # rows where the column's difference is +1
    down = 0  # rows where it is -1
    for char in b:
        match = positions.get(char, 0)
        # where the diagonal step is free
        diagonal = ((((match & up) + up) ^ up) | match | down) & ones
        right_up = ((down | (ones ^ (diagonal | up))) << 1 | 1) & ones  # where a step right adds 1
        right_down = up & diagonal
        up = (right_down << 1) & ones | (ones ^ (diagonal | right_up))
        down = right_up & diagonal
    return len(b) + up.bit_count() - down.bit_count()  # the top row, then the last column


def similarity(a, b):
    """Edit similarity of two strings, in [0, 1]; two empty ones are equal."""
    return 1.0 - levenshtein(a, b) / max(len(a), len(b), 1)  # eq. 2


@dataclass(frozen=True)
class Grade:
    """What there is to know about one answer. Comments and blank lines do not count."""

    completion: str
    format: float  # +1.0 or -1.0
    code: str | None = None  # the answer's code
    parses: bool = False
    es: float = 0.0  # edit similarity to the reference, in [0, 1]
    em: float = 0.0  # 1.0 if the code equals the reference
    stale: float = 0.0  # 1.0 if it repeats the old code although the update asks for a change
    obeys: float | None = None  # 1.0 if it has all new names of the note, else 0.0; None: no name

    @property
    def es_star(self):
        return 3.5 * self.es - 1.5 if self.parses else -2.0  # eq. 3

    @property
    def em_star(self):
        return 3.5 * self.em - 1.5 if self.parses else -2.0  # eq. 4


def words(text):
    """The set of all words in a text: identifiers, and keywords or English words like them."""
    return set(re.findall(r"[A-Za-z_]\w*", text))


def needed(example):
    """The words that an answer needs to follow the note: the reference's new ones that it names."""
    old = words(strip_comments(example.old_code))
    note = getattr(example, "update_info", "")
    return (words(strip_comments(example.new_code)) - old) & words(note)


def grade(completion, example):
    """The Grade of a completion; `example` needs old_code, new_code and, for obeys, update_info."""
    form = format_reward(completion)
    code = extract_code(completion)
    wanted = needed(example)
    if code is None:
        return Grade(completion, form, obeys=0.0 if wanted else None)
    answer = strip_comments(code)
    old = strip_comments(example.old_code)
    reference = strip_comments(example.new_code)
    es = similarity(answer, reference)
    em = float(answer == reference)
    stale = float(answer == old and old != reference)
    valid = parses(code)
    obeys = float(valid and wanted <= words(answer)) if wanted else None  # eq. 8
    return Grade(completion, form, code, valid, es, em, stale, obeys)


def gain_star(grade, example):
    """The correctness of the share of the requested edit that an answer has made, in [-2, 2]."""
    old = strip_comments(example.old_code)
    reference = strip_comments(example.new_code)
    if old == reference:
        return grade.es_star
    if grade.stale or not grade.parses:
        return -2.0
    distance = levenshtein(strip_comments(grade.code), reference)
    gain = 1 - distance / levenshtein(old, reference)  # eq. 5
    return 3.5 * max(gain, 0.0) - 1.5  # eq. 6


def strict_star(grade, example):
    """gain_star(), but where no change is asked for, all but the old code earns -2."""
    if strip_comments(example.old_code) != strip_comments(example.new_code):
        return gain_star(grade, example)
    return 2.0 if grade.em else -2.0  # eq. 7


CORRECTNESS = {  # name -> function of a Grade and the whole example
    "es_star": lambda grade, example: grade.es_star,
    "em_star": lambda grade, example: grade.em_star,
    "gain": gain_star,
    "strict": strict_star,
    "es": lambda grade, example: grade.es,
    "em": lambda grade, example: grade.em,
    "none": lambda grade, example: 0.0,  # rewards the format alone
}


def total(grade, example, correctness="es_star"):
    """The total reward of a graded answer, a float; `correctness` is a key of CORRECTNESS."""
    return grade.format + CORRECTNESS[correctness](grade, example)  # eq. 1


def bare(target):
    """An example that has nothing but its reference."""
    return SimpleNamespace(old_code="", new_code=target)


def es_star(completion, target):
    """The paper's correctness, in [-2, 2]: similarity, but only for code that parses."""
    return grade(completion, bare(target)).es_star


def em_star(completion, target):
    """Exact match with the same penalty for code that does not parse: -2.0, -1.5 or 2.0."""
    return grade(completion, bare(target)).em_star


def score(completion, target, correctness="es_star"):
    """total() against a reference string; the example that `correctness` sees has nothing else."""
    example = bare(target)
    return total(grade(completion, example), example, correctness)
