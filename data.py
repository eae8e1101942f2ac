"""The data: version-migration examples, their prompt, and the order in which they come.

An example is a line of a JSONL file, an object with six text fields:

    dependency   library that changed             update_info  what changed, as release notes say
    new_version  "2.0.0" or "==2.0.0"             old_code     code against the old version
    description  what the code does (not shown)   new_code     the reference answer

A source is a path to such a file, or the id of a data set on the Hugging Face hub (owner/Name,
which must hold name.jsonl): zjunlp/ReCode-Train-Data is the paper's.

The prompt, in training and evaluation, is a system message, a user message and the beginning of the
assistant's turn, which stays open: the model continues inside the think block. A target is the
completion that SFT copies: the reference after an empty thought.

    python -m tools.check_data my.jsonl    checks a data set of your own
"""

import random
import re
from dataclasses import dataclass, fields

import reward
from lib.config import BadInput, first_line
from lib.files import json_rows, locate, unix_lines

SYSTEM = (
    "You migrate code to a new version of a library. Follow the update notes you are given, "
    "even where they contradict what you remember of the library. Think first, then answer."
)
USER = """\
{dependency} changed in version {new_version}. The update notes say:
<doc>
{update_info}
</doc>
This code was written for an older version:
```python
{old_code}
```
Rewrite it for version {new_version}. Reason inside <think> </think>, then give the complete \
new code inside <answer> </answer>, in a ```python fence."""
OPENING = "Let me solve this step by step.\n<think>"
TARGET = "\n{thought}\n</think>\n<answer>\n```python\n{new_code}\n```\n</answer>"


@dataclass(frozen=True)
class Example:
    """One migration task: the fields of a record, the version without its "=="."""

    dependency: str
    new_version: str
    description: str
    update_info: str
    old_code: str
    new_code: str


def read_example(where, row):
    """The Example of a row, in which null counts as empty text; BadInput unless all is text."""
    texts = {}
    for name in [field.name for field in fields(Example)]:
        if name not in row:
            raise BadInput(f"{where}: field {name!r} is missing; a row has six fields")
        if not isinstance(row[name], str | None):
            raise BadInput(f"{where}: field {name!r} is not text but {row[name]!r:.40}")
        texts[name] = unix_lines(row[name] or "")
    texts["new_version"] = texts["new_version"].removeprefix("==").strip()
    return Example(**texts)


def fault(example):
    """Why a row would teach nothing or the wrong thing; "" for a usable row."""
    texts = [example.dependency, example.update_info]
    codes = [example.old_code, example.new_code]  # an empty answer must not earn 3.0
    texts += map(reward.strip_comments, codes)
    if not all(text.strip() for text in texts):
        return "no update note or no code"
    if re.search("[\ud800-\udfff]", "".join(vars(example).values())):
        return "not valid Unicode"
    if not reward.parses(example.new_code):  # an exact copy would earn -2.0
        return "the reference does not parse"
    return ""


def load_examples(source, dropped=None):
    """The usable examples of `source`, a path or a hub id, in file order: list[Example].

    A dict passed as `dropped` receives reason -> list of "PATH, line N". BadInput if a line is not
    a record, or no row is usable.
    """
    dropped = {} if dropped is None else dropped
    path = locate(source)
    examples = {}  # what makes a row a repeat -> the example
    for where, row in json_rows(path, path.read_bytes()):
        example = read_example(where, row)
        task = (example.dependency, example.update_info, example.old_code, example.new_code)
        reason = fault(example)
        if task in examples and not reason:
            reason = "repeat of an earlier row"
        if reason:
            dropped.setdefault(reason, []).append(where)
        else:
            examples[task] = example
    if not examples:
        reasons = [f"{len(where)} {reason}, e.g. {where[0]}" for reason, where in dropped.items()]
        why = "; ".join(reasons) if reasons else "the file is empty"
        raise BadInput(f"data: no usable row in {source!r}: {why}")
    return list(examples.values())


def split_heldout(heldout, examples, seed):
    """(training examples, held-out examples); `heldout` is "", a share like "0.05", or a source.

    A share is of the update notes, so no note of a held-out example occurs in training. Both sides
    keep the file order.
    """
    if not heldout:
        return examples, []
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", heldout):
        return examples, load_examples(heldout)
    notes = sorted({(e.dependency, e.update_info) for e in examples})
    random.Random(seed).shuffle(notes)
    count = round(float(heldout) * len(notes))
    if not 0 < count < len(notes):
        text = f"heldout: {heldout} of {len(notes)} update notes leaves one side empty"
        raise BadInput(f"{text}; give a share like 0.05")
    chosen = set(notes[:count])
    train = [e for e in examples if (e.dependency, e.update_info) not in chosen]
    return train, [e for e in examples if (e.dependency, e.update_info) in chosen]


MARK = "\ufdd0"  # Unicode reserves it for a program's own use


def special_pattern(tokenizer):
    """A pattern of all special tokens, the longest first; what hide() has marked is none."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
    return re.compile(f"(?<!{MARK})({'|'.join(map(re.escape, texts))})")


def hide(match):
    """A text that looks like a special token, with a MARK before each character."""
    return MARK.join(["", *match[0]])


def encode_hidden(text, special, tokenizer):
    """The token ids of `text`; what was hidden is encoded as text, all else as usual."""
    if MARK not in text:
        return tokenizer.encode(text, add_special_tokens=False)
    ids = []
    for part in special.split(text):
        settings = {"split_special_tokens": not special.fullmatch(part)}
        ids += tokenizer.encode(part.replace(MARK, ""), add_special_tokens=False, **settings)
    return ids


def encode_chat(messages, opening, tokenizer):
    """The token ids of messages, [(role, text)], and of an assistant's turn that stays open.

    The tokenizer's own chat template writes them; without one, the texts are joined by blank lines.
    Only the template's special tokens are special: what looks like one in a text stays text. Raises
    BadInput for a template that fails or loses a text.
    """
    if tokenizer.chat_template is None:
        texts = [text.rstrip("\n") for _, text in messages]
        ids = tokenizer.encode("\n\n".join([*texts, opening]), split_special_tokens=True)
        while ids[-1] in tokenizer.all_special_ids:  # some tokenizers append EOS
            ids.pop()
        return ids
    special = special_pattern(tokenizer)
    turns = [{"role": role, "content": special.sub(hide, text)} for role, text in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        problem = "drops or changes a text"
    except Exception as error:  # a template may raise anything
        text = ""
        problem = f"does not work: {first_line(error)}"
    if not all(turn["content"].strip() in text for turn in turns):
        raise BadInput(f"model: the tokenizer's chat template {problem}; fix or remove it")
    return encode_hidden(text + opening, special, tokenizer)


def encode_messages(system, user, tokenizer):
    """A prompt's token ids, list[int]: two messages, and a turn that begins with OPENING.

    For a template that refuses or drops a system message, both are one user message.
    """
    try:
        return encode_chat([("system", system), ("user", user)], OPENING, tokenizer)
    except BadInput:
        return encode_chat([("user", f"{system}\n\n{user}")], OPENING, tokenizer)


def encode_prompt(example, tokenizer):
    """The token ids of a migration task's prompt, list[int]; see encode_messages."""
    return encode_messages(SYSTEM, USER.format(**vars(example)), tokenizer)


def encode_target(example, tokenizer):
    """The token ids of a completion that earns the full reward, with its EOS, list[int].

    The data holds no reasoning, so the thought is empty; quoting the note in it made SFT worse.
    """
    text = TARGET.format(thought="", new_code=example.new_code)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids + [tokenizer.eos_token_id]


def encode_tasks(examples, tokenizer, max_prompt_tokens):
    """[(prompt ids, Example)] of the examples whose prompt fits; BadInput if there is none."""
    tasks = [(encode_prompt(example, tokenizer), example) for example in examples]
    kept = [task for task in tasks if len(task[0]) <= max_prompt_tokens]
    if not kept:
        shortest = min(len(prompt) for prompt, _ in tasks)
        raise BadInput(f"max-prompt-tokens {max_prompt_tokens}: the shortest is {shortest} tokens")
    return kept


def draw(tasks, position, count, seed):
    """Tasks `position` to `position + count` of an endless stream, reshuffled every epoch.

    A pure function of its arguments: to resume, a run only has to remember `position`.
    """
    drawn = []
    epoch, place = divmod(position, len(tasks))
    while len(drawn) < count:
        order = random.Random(f"{seed} {epoch}").sample(tasks, len(tasks))
        drawn += order[place : place + count - len(drawn)]
        epoch += 1
        place = 0
    return drawn
