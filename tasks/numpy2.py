"""NumPy 2: rewrite a program as an update note says, judged by running it.

numpy2.jsonl holds 80 records of data.py, each with a test, in the groups of docs/evaluation.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import data
from tasks.migration import stray_lines
from tasks.problem import Problem, check_texts

ROWS = str(Path(__file__).with_suffix(".jsonl"))


@dataclass(frozen=True, kw_only=True)
class Program(Problem):
    example: data.Example

    def encode(self, tokenizer):
        return data.encode_prompt(self.example, tokenizer)

    def judge(self, completion, box):
        code, _ = self.extract(completion)
        stray = None if code is None else stray_lines(self.example, code)
        unchanged = float(stray == 0) if self.update_type == "unrelated" else None
        return super().judge(completion, box) | {"unchanged": unchanged, "stray_lines": stray}


def read(row, no_update=False, plain=False):
    """The program of a row. Its control is the old code, or an empty program if that runs."""
    check_texts(row, ["name", "group", "test"])
    example = data.read_example(row["name"], row)
    yield Program(
        name=row["name"], update_type=row["group"], tests=(row["test"],),
        control="pass" if row["group"] == "unrelated" else example.old_code,
        example=replace(example, update_info="") if no_update else example,
        reference=example.new_code,
    )  # fmt: skip
