"""Migration: rewrite old code as an update note says, with the prompt of training.

An answer is right when it equals the reference, comments and blank lines aside. Nothing is run.
Rows whose reference equals the old code, comments aside, ask for no change: a group of their own.
"""

import re
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import data
import reward


def determined(example):
    """Whether the note and the old code hold every word and number of the reference."""
    given = re.findall(r"\w+", f"{reward.strip_comments(example.old_code)} {example.update_info}")
    return set(re.findall(r"\w+", reward.strip_comments(example.new_code))) <= set(given)


@dataclass(frozen=True)
class Migration:
    name: str
    package: str
    example: data.Example
    update_type: str  # "change" or "no change"

    def encode(self, tokenizer):
        return data.encode_prompt(self.example, tokenizer)

    def judge(self, completion, box):
        grade = reward.grade(completion, self.example)
        changed = self.update_type == "change"
        verdict = {name: getattr(grade, name) for name in ("es_star", "em_star", "obeys", "stale")}
        return verdict | {
            "passed": grade.em == 1,
            "reward": reward.total(grade, self.example),  # format + es_star
            "determined": grade.em if changed and determined(self.example) else None,
            "unchanged": None if changed else grade.em,
            "format": grade.format > 0,
            "no_code": grade.code is None,
        }


def load(source, no_update=False):
    """The examples of a source as problems, named by their number."""
    for i, example in enumerate(data.load_examples(source)):
        if no_update:  # the doc element stays in the prompt, empty
            example = replace(example, update_info="")
        same = reward.strip_comments(example.old_code) == reward.strip_comments(example.new_code)
        kind = "no change" if same else "change"
        yield Migration(str(i), example.dependency, example, kind)


def stray_lines(example, code):
    """How many lines `code` changes that the reference does not; comments and blank lines aside.

    Counted are the old lines that the reference keeps and `code` does not, or the lines that `code`
    adds beyond the reference's number, if they are more.
    """
    texts = example.old_code, example.new_code, code
    old, *others = [reward.strip_comments(text).split("\n") for text in texts]
    lost, added = [], []
    for text in others:
        blocks = SequenceMatcher(None, old, text, autojunk=False).get_matching_blocks()
        kept = {block.a + i for block in blocks for i in range(block.size)}
        lost.append(set(range(len(old))) - kept)
        added.append(len(text) - len(kept))
    return max(len(lost[1] - lost[0]), added[1] - added[0])
