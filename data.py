"""The data: version-migration examples, the prompt that shows them, and the order they come in.

One example is one JSON object a line with six text fields:

    dependency   library that changed             update_info  what changed, as release notes say
    new_version  "2.0.0" or "==2.0.0"             old_code     code against the old version
    description  what the code does (not shown)   new_code     the reference answer

A source is a path to such a JSONL file, or the id of a data set on the Hugging Face hub
(owner/Name, which must hold name.jsonl): zjunlp/ReCode-Train-Data is the paper's.

The prompt is a system message, a user message, and the beginning of the assistant's turn, which
stays open: the model goes on inside the think block. Training and evaluation share it. A target is
the completion that supervised training copies: the reference, behind an empty thought.

    python -m tools.check_data my.jsonl --model Qwen/Qwen2.5-Coder-7B-Instruct    checks your own
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import reward
from training.config import BadInput

SYSTEM = (
    "You migrate code to a new version of a library. Follow the update notes you are given, even where "
    "they contradict what you remember of the library. Think first, then answer."
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
Rewrite it for version {new_version}. Reason inside <think> </think>, then give the complete new code \
inside <answer> </answer>, in a ```python fence."""
OPENING = "Let me solve this step by step.\n<think>"
TARGET = "\n{thought}\n</think>\n<answer>\n```python\n{new_code}\n```\n</answer>"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/Name


@dataclass(frozen=True)
class Example:
    """One migration task; the fields are those of the record, the version without its "=="."""

    dependency: str
    new_version: str
    description: str
    update_info: str
    old_code: str
    new_code: str


def locate(source):
    """The local path of `source`: the path itself, or the hub's file, downloaded once and cached."""
    path = Path(source)
    if path.is_file():
        return path
    if path.exists() or not HUB_ID.fullmatch(source) or path.suffix in (".json", ".jsonl"):
        raise BadInput(f"data: no file {source!r}; give a JSONL file or a hub id like zjunlp/ReCode-Train-Data")
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import HfHubHTTPError

    logging.set_verbosity_error()  # its retries are no news; their outcome is
    name = source.split("/")[1].lower() + ".jsonl"
    try:
        return Path(hf_hub_download(source, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:  # no network, no such data set, no such file in it
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"data: cannot fetch {name} of {source!r} from the hub ({reason}); give a local JSONL file")


def json_rows(path, content):
    """Yield ("PATH, line N", row) for every line of a JSONL file's `content`, bytes; each must be a JSON object."""
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
    """Yield ("PATH, line N", row) of a JSONL file of migration tasks; a row has the six fields, each a str or None."""
    for where, row in json_rows(path, path.read_bytes()):
        for field in fields(Example):
            if field.name not in row:
                raise BadInput(f"{where}: field {field.name!r} is missing; a row has six fields")
            if not isinstance(row[field.name], str | None):
                raise BadInput(f"{where}: field {field.name!r} is not text but {row[field.name]!r:.40}")
        yield where, {field.name: row[field.name] for field in fields(Example)}


def sift(path):
    """Yield ("PATH, line N", Example or None, why it is dropped or "") for every row of a JSONL file."""
    seen = set()
    for where, row in read_rows(path):
        text = "".join(value or "" for value in row.values())
        key = (row["dependency"], row["update_info"], row["old_code"], row["new_code"])  # what the model sees
        if not all(key):
            yield where, None, "no update note or no code"
        elif any("\ud800" <= char <= "\udfff" for char in text):
            yield where, None, "not valid Unicode"
        elif not reward.parses(row["new_code"]):
            yield where, None, "the reference does not parse"  # a perfect copy of it would earn -2.0
        elif key in seen:
            yield where, None, "repeat of an earlier row"
        else:
            seen.add(key)
            row["new_version"] = (row["new_version"] or "").removeprefix("==").strip()
            yield where, Example(**row), ""


def load_examples(source, dropped=None):
    """The usable examples of `source` (a path or a hub id), in file order: list[Example].

    Rows that would teach nothing or the wrong thing are left out; a Counter passed as `dropped`
    receives reason -> rows. Raises BadInput for a file that cannot be read, a line that is no
    record, or a source without a usable row.
    """
    dropped, examples = Counter() if dropped is None else dropped, []
    for _, example, reason in sift(locate(source)):
        if example:
            examples.append(example)
        else:
            dropped[reason] += 1
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the file is empty"
        raise BadInput(f"data: no usable row in {source!r}: {reasons}")
    return examples


def split_heldout(heldout, examples, seed):
    """(training examples, held-out examples); `heldout` is "", a share such as "0.05", or a source."""
    if not heldout:
        return examples, []
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", heldout):
        return examples, load_examples(heldout)
    count = round(float(heldout) * len(examples))
    if not 0 < count < len(examples):
        raise BadInput(f"heldout: {heldout} of {len(examples)} rows leaves one side empty; give a share like 0.05")
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def encode_messages(system, user, tokenizer):
    """A prompt's token ids, list[int], through the tokenizer's own chat template.

    The template writes the two messages and the head of the assistant's turn; OPENING follows as it
    is, so the turn stays open whatever the template does to assistant text. Without a template the
    same three texts stand below each other, parted by blank lines.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"{system}\n\n{user}\n\n{OPENING}")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text + OPENING, add_special_tokens=False)


def encode_prompt(example, tokenizer):
    """The token ids of a migration task's prompt, list[int]; see encode_messages."""
    record = {field.name: getattr(example, field.name) for field in fields(Example)}
    return encode_messages(SYSTEM, USER.format(**record), tokenizer)


def encode_target(example, tokenizer):
    """The token ids of a completion that earns the full reward, with its EOS, list[int].

    The data holds no reasoning, so the thought is a choice: it is empty. Quoting the update note in it
    was tried as well; on the embedded model's dev.jsonl it made supervised training worse.
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
        raise BadInput(f"max-prompt-tokens {max_prompt_tokens}: the shortest prompt has {shortest} tokens")
    return kept


def draw(tasks, position, count, seed):
    """Tasks `position` to `position + count` of an endless stream that shuffles anew every epoch.

    A pure function of its arguments: to go on after a stop, remember one number.
    """
    orders = {}
    for epoch in range(position // len(tasks), (position + count - 1) // len(tasks) + 1):
        orders[epoch] = random.Random(f"{seed} {epoch}").sample(tasks, len(tasks))
    return [orders[i // len(tasks)][i % len(tasks)] for i in range(position, position + count)]
