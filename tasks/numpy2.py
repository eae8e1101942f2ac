"""NumPy 2: rewrite a program as an update note says, judged by running it. Nothing is downloaded.

numpy2.jsonl holds 80 programs that were written for this project: records of data.py, each with a
test. The values that the tests expect come from the old programs under NumPy 1.26. Three groups:

    seen         a removed name that the program uses is a word of the paper's training notes
    unseen       none is
    unrelated    the note names nothing in the program, so the right answer is the program itself
"""

from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

import data
import reward
from lib.files import json_rows
from tasks.problem import Problem, check_texts

ROWS = str(Path(__file__).with_suffix(".jsonl"))


def stray_lines(old, reference, code):
    """How many lines `code` changes that the reference does not; comments and blank lines aside.

    difflib matches each with `old`. Counted are the lines of `old` that the reference keeps and
    `code` does not, or the lines that `code` adds beyond the reference's number, if they are more.
    """
    old, *texts = [reward.strip_comments(text).split("\n") for text in (old, reference, code)]
    lost = []
    added = []
    for text in texts:
        blocks = SequenceMatcher(None, old, text, autojunk=False).get_matching_blocks()
        kept = {block.a + i for block in blocks for i in range(block.size)}
        lost.append(set(range(len(old))) - kept)
        added.append(len(text) - len(kept))
    return max(len(lost[1] - lost[0]), added[1] - added[0])


@dataclass(frozen=True, kw_only=True)
class Program(Problem):
    example: data.Example

    def encode(self, tokenizer):
        return data.encode_prompt(self.example, tokenizer)

    def judge(self, completion, box):
        code, _ = self.extract(completion)
        stray = None if code is None else stray_lines(self.example.old_code, self.reference, code)
        unchanged = float(stray == 0) if self.update_type == "unrelated" else None
        return super().judge(completion, box) | {"unchanged": unchanged, "stray_lines": stray}


def load(source, no_update=False):
    """The programs of a JSONL file. A control is the old code, or an empty program if that runs."""
    problems = []
    path = data.locate(source)
    for where, row in json_rows(path, path.read_bytes()):
        check_texts(where, row, ["name", "group", "test"])
        example = data.read_example(where, row)
        problem = Program(
            name=row["name"], update_type=row["group"], tests=(row["test"],), question="", setup="",
            example=replace(example, update_info="") if no_update else example,
            reference=example.new_code, controls="as old or empty code",
            control="pass" if row["group"] == "unrelated" else example.old_code,
        )  # fmt: skip
        problems.append(problem)
    return problems
