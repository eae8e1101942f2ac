"""Migration: rewrite old code as an update note says, with the prompt of training.

An answer is right when it equals the reference, comments and blank lines aside. Nothing is run.
Rows whose reference equals the old code, comments aside, ask for no change: a group of their own,
where no answer is stale. review() looks at the answer to a task that has no reference.
"""

import ast
import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import data
import reward


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
        return {
            "passed": grade.em == 1,
            "reward": reward.total(grade, self.example),  # format + es_star
            "es_star": grade.es_star,
            "em_star": grade.em_star,
            "obeys": grade.obeys,
            "determined": grade.em if changed and reward.determined(self.example) else None,
            "unchanged": None if changed else grade.em,
            "stale": grade.stale,
            "format": grade.format > 0,
            "no_code": grade.code is None,
        }


def load(source, no_update=False):
    """The examples of a source as problems, named by their number."""
    problems = []
    for i, example in enumerate(data.load_examples(source)):
        if no_update:  # the doc element stays in the prompt, empty
            example = replace(example, update_info="")
        same = reward.strip_comments(example.old_code) == reward.strip_comments(example.new_code)
        kind = "no change" if same else "change"
        problems.append(Migration(str(i), example.dependency, example, kind))
    return problems


DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def parts(code):
    """(set of the names in Python code, kind -> Counter of definitions, comments, docstrings)."""
    with warnings.catch_warnings(action="ignore"):  # odd escapes in strings
        module, *nodes = ast.walk(ast.parse(code))
    fields = ("id", "attr", "arg", "name", "module")
    names = [getattr(node, field, None) or "" for node in nodes for field in fields]
    defined = [node for node in nodes if isinstance(node, DEFINITION)]
    docstrings = [ast.get_docstring(node) for node in (module, *defined)]
    comments = [code[start:end] for start, end in reward.comments(code)]
    return set(".".join(names).split(".")), {
        "definitions": Counter(node.name for node in defined),
        "comments": Counter(text.strip() for text in comments),
        "docstrings": Counter(text for text in docstrings if text),
    }


def review(example, code):
    """What to check in the new code, four lists.

    still_named: names in the note whose last part, `in1d` of `np.in1d`, is a name in the old code
    and in the new; not the library, and not very short ones. Some are meant to stay, e.g. a
    function whose argument was renamed.
    lost_definitions, lost_comments, lost_docstrings: in the old code and not in the new; functions
    and classes by name, the others word for word.
    """
    names, old = parts(example.old_code)
    new_names, new = parts(code)
    kept = (names & new_names) - {example.dependency.lower()}
    noted = dict.fromkeys(re.findall(r"[^\W\d][\w.]*\w\w", example.update_info))  # each once
    still_named = [name for name in noted if name.rpartition(".")[2] in kept]
    lost = {f"lost_{kind}": list((old[kind] - new[kind]).elements()) for kind in old}
    return {"still_named": still_named} | lost
