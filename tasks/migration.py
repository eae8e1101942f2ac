"""Migration: rewrite old code as an update note says, with the prompt of training.

An answer is right when it equals the reference, comments and blank lines aside. Nothing is run.
"""

from dataclasses import dataclass, replace

import data
import reward


@dataclass(frozen=True)
class Migration:
    name: str
    package: str
    example: data.Example
    update_type: str = ""

    def encode(self, tokenizer):
        return data.encode_prompt(self.example, tokenizer)

    def judge(self, completion, box):
        grade = reward.grade(completion, self.example)
        form = {"format": grade.format > 0, "no_code": grade.code is None, "stale": grade.stale}
        rewards = {"es_star": grade.es_star, "em_star": grade.em_star}
        return rewards | form | {"passed": grade.em == 1}


def load(source, no_update=False):
    """The examples of a source as problems, named by their number."""
    problems = []
    for i, example in enumerate(data.load_examples(source)):
        if no_update:  # the doc element stays in the prompt, empty
            example = replace(example, update_info="")
        problems.append(Migration(str(i), example.dependency, example))
    return problems
