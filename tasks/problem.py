"""What the benchmarks with tests share: a problem and its verdicts."""

from dataclasses import dataclass

import data
import reward
from lib.files import unix_lines

SYSTEM = "You write Python code. {}Think first, then answer."
OBEY = """\
Follow the update notes you are given, even where they contradict what you remember of a library. \
"""
REQUEST = """\
Reason inside <think> </think>, then give the complete code inside <answer> </answer>, in a \
```python fence."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    name: str
    note: str = ""  # on the update
    question: str = ""
    reference: str
    control: str  # code that must fail, without the update if there is one
    setup: str = ""  # runs before an answer
    update: str = ""  # runs after setup: puts the new function into its library
    tests: tuple
    entry_point: str | None = None  # the function that check() of HumanEval's tests is given
    package: str = ""
    update_type: str = ""

    def encode(self, tokenizer):
        """The prompt's token ids, list[int]; its request is that of training."""
        system = SYSTEM.format(OBEY if self.note else "")
        return data.encode_messages(system, self.note + self.question + REQUEST, tokenizer)

    def extract(self, completion):
        """(the completion's code or None, whether it has the form that was asked for)"""
        return reward.extract_code(completion), reward.format_reward(completion) > 0

    def run(self, box, code, updated=True):
        """The sandbox's verdict on `code`, with or without the update."""
        setup = f"{self.setup}\n{self.update if updated else ''}\n"
        return box.run(code, self.tests, setup=setup, entry_point=self.entry_point)

    def judge(self, completion, box):
        """What there is to know about a completion: plain values, "passed" among them."""
        code, well_formed = self.extract(completion)
        verdict = {"format": well_formed, "no_code": code is None, "passed": False}
        verdict["status"] = "no code"
        if code is not None:
            result = self.run(box, code)
            verdict |= vars(result) | {"passed": result.passed}
        if self.update:
            passed = verdict["passed"]
            verdict["updated"] = passed and not self.run(box, code, updated=False).passed
        return verdict


def check_texts(row, names):
    """Give the named fields Unix line ends; ValueError unless all are text."""
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
            raise ValueError(f"field {name!r} {'is not text' if name in row else 'is missing'}")
        row[name] = unix_lines(value)
