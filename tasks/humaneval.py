"""HumanEval (arXiv 2107.03374) and HumanEval+ (arXiv 2305.01210): complete a function.

An answer is a whole function, run behind the prompt, so the prompt's imports hold; it is right when
it passes check(). HumanEval+ comes from the hub, or as evalplus's own file with base_input,
plus_input and atol, where the reference gives the expected values, +- atol or 1e-6 for floats.

The plain form is the benchmark's usual chat, as in evalplus: one user message, the template's own
system message, and an assistant turn that begins with "```python\\n". The code ends at "\\n```".
"""

import json

import data
from reward import FENCE, FENCE_END
from tasks.problem import Problem, check_texts

QUESTION = "Complete this function:\n```python\n{}\n```\n"
PLAIN = "Complete this function in a markdown python code block:\n```python\n{}\n```\n"
PLUS = """
import copy, json
inputs, atol, space = json.loads({inputs!r}), {atol!r} or 1e-6, {{}}
exec({reference!r}, space)

def close(a, b):
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(close, a, b))
    return a == b or isinstance(b, float) and abs(a - b) <= atol + 1e-7 * abs(b)

def check(candidate):
    for args in inputs:
        value = candidate(*copy.deepcopy(args))
        if {entry!r} == "find_zero":  # any root will do
            assert abs(sum(c * value**i for i, c in enumerate(args[0]))) <= atol, args
        else:
            assert close(value, space[{entry!r}](*copy.deepcopy(args))), args
"""


class Plain(Problem):
    """A problem in the plain form."""

    def encode(self, tokenizer):
        return data.encode_chat([("user", self.question)], FENCE, tokenizer)

    def extract(self, completion):
        code, end, _ = completion.partition(FENCE_END)
        return (code if code.strip() else None), end != ""


def read(row, no_update=False, plain=False):
    """The problem of a row of either schema."""
    check_texts(row, ["task_id", "prompt", "entry_point", "canonical_solution"])
    entry = row["entry_point"]
    reference = row["prompt"] + row["canonical_solution"]
    if row.get("plus_input") is not None:
        known = {"inputs": json.dumps([*row["base_input"], *row["plus_input"]])}
        known |= {"atol": row.get("atol", 0), "reference": reference, "entry": entry}
        row["test"] = PLUS.format_map(known)
    check_texts(row, ["test"])
    form, question = (Plain, PLAIN) if plain else (Problem, QUESTION)
    yield form(
        name=row["task_id"], question=question.format(row["prompt"].strip("\n")),
        reference=reference, control="pass", setup=row["prompt"], tests=(row["test"],),
        entry_point=entry,
    )  # fmt: skip
