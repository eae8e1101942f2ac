"""The data: version-migration examples, their prompt, and the order in which they come.

An example is a line of a JSONL file, an object with six text fields:

    dependency   library that changed             update_info  what changed, as release notes say
    new_version  "2.0.0" or "==2.0.0"             old_code     code against the old version
    description  what the code does (not shown)   new_code     the reference answer

A source is a path to such a JSONL file, or the id of a data set on the Hugging Face hub
(owner/Name, which must hold name.jsonl): zjunlp/ReCode-Train-Data is the paper's.

The prompt is a system message, a user message and the beginning of the assistant's turn, which
stays open: the model continues inside the think block. Training and evaluation share it. A target
is the completion that SFT copies: the reference after an empty thought.

    python -m tools.check_data my.jsonl    checks a data set of your own
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError

import reward
from training.config import BadInput

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
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/Name


@dataclass(frozen=True)
class Example:
    """One migration task: the fields of a record, the version without its "=="."""

    dependency: str
    new_version: str
    description: str
    update_info: str
    old_code: str
    new_code: str


def fetch(hub_id, name):
    """The local path of file `name` of a data set on the hub, downloaded once and cached."""
    hub_logging.set_verbosity_error()  # silences retries; the final error is reported below
    try:
        return Path(hf_hub_download(hub_id, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:  # no network, no such data set, no such file in it
        reason = str(error).strip().split("\n")[0]
        raise BadInput(
            f"data: cannot fetch {name} of {hub_id!r} from the hub ({reason}); "
            "give a local JSONL file"
        )


def locate(source):
    """The local path of `source`: the path itself, or the hub's file."""
    path = Path(source)
    if path.is_file():
        return path
    if path.exists() or not HUB_ID.fullmatch(source) or path.suffix in (".json", ".jsonl"):
        raise BadInput(
            f"data: no file {source!r}; give a JSONL file or a hub id like zjunlp/ReCode-Train-Data"
        )
    return fetch(source, source.split("/")[1].lower() + ".jsonl")


def json_rows(path, content):
    """Yield ("PATH, line N", row) for every line of a JSONL file's `content`, bytes.

    Each line must be a JSON object; blank lines are skipped.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise BadInput(f"{where}: not JSON ({error}); each line must be one JSON object")
        if not isinstance(row, dict):
            raise BadInput(f"{where}: not a JSON object but {type(row).__name__}")
        yield where, row


def read_rows(path):
    """Yield ("PATH, line N", row) of a JSONL file of migration tasks; fields are str or None."""
    for where, row in json_rows(path, path.read_bytes()):
        for field in fields(Example):
            if field.name not in row:
                raise BadInput(f"{where}: field {field.name!r} is missing; a row has six fields")
            if not isinstance(row[field.name], str | None):
                value = f"{row[field.name]!r:.40}"
                raise BadInput(f"{where}: field {field.name!r} is not text but {value}")
        yield where, {field.name: row[field.name] for field in fields(Example)}


def sift(path):
    """Yield ("PATH, line N", Example or None, why it is dropped or "") for every row of a file."""
    seen = set()
    for where, row in read_rows(path):
        text = "".join(value for value in row.values() if value)
        shown = ("dependency", "update_info", "old_code", "new_code")  # all that tells rows apart
        key = tuple(row[name] for name in shown)
        if not all(key):
            yield where, None, "no update note or no code"
        elif any("\ud800" <= char <= "\udfff" for char in text):
            yield where, None, "not valid Unicode"
        elif not reward.parses(row["new_code"]):
            yield where, None, "the reference does not parse"  # an exact copy would earn -2.0
        elif key in seen:
            yield where, None, "repeat of an earlier row"
        else:
            seen.add(key)
            version = row["new_version"] if row["new_version"] else ""
            row["new_version"] = version.removeprefix("==").strip()
            yield where, Example(**row), ""


def load_examples(source, dropped=None):
    """The usable examples of `source`, a path or a hub id, in file order: list[Example].

    Rows that would teach nothing or the wrong thing are dropped; a Counter passed as `dropped`
    receives reason -> rows. Raises BadInput for a file that cannot be read, a line that is not a
    record, or a source without a usable row.
    """
    dropped = Counter() if dropped is None else dropped
    examples = []
    for _, example, reason in sift(locate(source)):
        if example:
            examples.append(example)
        else:
            dropped[reason] += 1
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        reasons = reasons if reasons else "the file is empty"
        raise BadInput(f"data: no usable row in {source!r}: {reasons}")
    return examples


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
        raise BadInput(
            f"heldout: {heldout} of {len(notes)} update notes leaves one side empty; "
            "give a share like 0.05"
        )
    chosen = set(notes[:count])
    train = [e for e in examples if (e.dependency, e.update_info) not in chosen]
    return train, [e for e in examples if (e.dependency, e.update_info) in chosen]


def encode_messages(system, user, tokenizer):
    """A prompt's token ids, list[int], through the tokenizer's own chat template.

    The template writes the two messages and the head of the assistant's turn. OPENING is appended
    as it is, so the turn stays open whatever the template does to assistant text. Without a
    template the three texts are joined by blank lines.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"{system}\n\n{user}\n\n{OPENING}")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    settings = {"add_generation_prompt": True, "tokenize": False}
    try:
        text = tokenizer.apply_chat_template(messages, **settings)
    except TemplateError:  # a template without a system role: its text goes into the user message
        text = apply_to_user(f"{system}\n\n{user}", tokenizer, settings)
    if not text:
        raise BadInput("model: the tokenizer's chat template is empty; save one or none with it")
    return tokenizer.encode(text + OPENING, add_special_tokens=False)


def apply_to_user(text, tokenizer, settings):
    """The chat template applied to a single user message."""
    try:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], **settings)
    except TemplateError as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"model: the tokenizer's chat template does not work: {reason}")


def encode_prompt(example, tokenizer):
    """The token ids of a migration task's prompt, list[int]; see encode_messages."""
    return encode_messages(SYSTEM, USER.format(**vars(example)), tokenizer)


def encode_target(example, tokenizer):
    """The token ids of a completion that earns the full reward, with its EOS, list[int].

    The data holds no reasoning, so the thought is a choice: it is empty. Quoting the update note
    in it was tried too; it made SFT worse on the embedded model's dev.jsonl.
    """
    text = TARGET.format(thought="", new_code=example.new_code)
    return tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]


def encode_tasks(examples, tokenizer, max_prompt_tokens, dropped):
    """[(prompt ids, Example)] of the examples whose prompt fits; `dropped` counts the others."""
    tasks = [(encode_prompt(example, tokenizer), example) for example in examples]
    kept = [task for task in tasks if len(task[0]) <= max_prompt_tokens]
    if len(kept) < len(tasks):
        dropped[f"prompt over {max_prompt_tokens} tokens"] += len(tasks) - len(kept)
    if not kept:
        shortest = min(len(prompt) for prompt, _ in tasks)
        raise BadInput(
            f"max-prompt-tokens {max_prompt_tokens}: the shortest prompt has {shortest} tokens"
        )
    return kept


def draw(tasks, position, count, seed):
    """Tasks `position` to `position + count` of an endless stream, reshuffled every epoch.

    A pure function of its arguments: to resume, a run only has to remember `position`.
    """
    drawn = []
    for i in range(position, position + count):
        epoch, place = divmod(i, len(tasks))
        if place == 0 or i == position:
            order = random.Random(f"{seed} {epoch}").sample(tasks, len(tasks))
        drawn.append(order[place])
    return drawn
