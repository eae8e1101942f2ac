"""HumanEval (arXiv 2107.03374) and HumanEval+ (arXiv 2305.01210): write a function."""

import json

from tasks.problem import Problem, read_rows, texts

COMPLETE = "Complete this function:\n```python\n{prompt}\n```\n"
PLUS = """
import copy, json
inputs, atol, space = json.loads({inputs!r}), {atol!r} or 1e-6, {{}}
exec({reference!r}, space)

def close(a, b):
    if isinstance(b, float) and isinstance(a, (int, float)):
        return a == b or abs(a - b) <= atol + 1e-7 * abs(b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(close, a, b))
    return a == b

def check(candidate):
    for args in inputs:
        value = candidate(*copy.deepcopy(args))
        if {entry!r} == "find_zero":  # any root will do
            assert abs(sum(c * value**i for i, c in enumerate(args[0]))) <= atol, args
        else:
            assert close(value, space[{entry!r}](*copy.deepcopy(args))), args
"""


def load_humaneval(source):
    """HumanEval and HumanEval+: an answer is a whole function and runs behind the prompt, so its imports hold."""
    found = []
    for where, row in read_rows(source):
        name, prompt, entry, body = texts(where, row, "task_id prompt entry_point canonical_solution")
        if isinstance(row.get("base_input"), list) and isinstance(row.get("plus_input"), list):
            inputs, atol = json.dumps(row["base_input"] + row["plus_input"]), row.get("atol", 0)
            test = PLUS.format(inputs=inputs, atol=atol, reference=prompt + body, entry=entry)
        else:
            (test,) = texts(where, row, "test")
        code = {"question": COMPLETE.format(prompt=prompt.strip("\n")), "reference": prompt + body, "setup": prompt}
        found.append(Problem(name, **code, tests=(test,), entry_point=entry))
    return found
