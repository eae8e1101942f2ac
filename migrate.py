"""Rewrite Python files for a new version of a library, following update notes; print a patch.

    python migrate.py src old.py --model runs/7b --library numpy --version 2.0 \\
        --update "np.in1d was removed; use np.isin" > migration.patch
    git show HEAD:old.py | python migrate.py - --library numpy --version 2.0 --update-file notes.txt

A file is cut into pieces: its definitions, the methods of a long class, its imports, and what
stands between them. The model answers several times for each piece that names something which the
notes name. Answers that do not fit their piece are dropped; of the others, the one most similar to
the rest is taken. Nothing is run: read the patch and the warnings, then apply it with `git apply`
or `patch -p1` at the root of the git work tree, or in the directory that stderr names.

--json prints an object a file: file, path (in the patch), changed, code, encoding, diff, errors,
still_named, pieces (name, line, changed, agreement, answers, usable, dropped).

Exit status: 0 nothing to change, 1 changed, 2 bad input (the patch holds the good files), 3 nothing
changed and a piece without a usable answer, 70 a defect.
"""

import json
import math
import re
import sys
from dataclasses import dataclass

from tqdm import tqdm

import data
import reward
import rollout
from lib import loading, parallel, sources
from lib.config import CHOICES, TINY, BadInput, Parser, open_policy
from lib.files import read_text, unix_lines
from lib.pieces import Piece, cut
from tasks import answers
from training import setup

PLAIN = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
BATCH = 1 << 17  # tokens that are sampled at once, prompts included


@dataclass
class Task:
    """A piece that is asked for."""

    source: sources.Source
    piece: Piece
    code: str  # the old code of its prompt
    prompt: list  # token ids
    limit: int = 0  # tokens that an answer may have
    room: float = math.inf  # tokens that the model has room for
    answers: list = ()


def find_tasks(source, tokenizer, args):
    """The Tasks of a file: its pieces that name something which the notes name."""

    def fits(lines):
        return len(tokenizer.encode("".join(lines), **PLAIN)) <= args.max_piece_tokens

    tasks = []
    for piece in cut(source.text, fits, whole=not args.max_piece_tokens):
        code = answers.question(piece, source.text)
        if args.all or answers.identifiers(code, args.library) & reward.words(args.update):
            version = args.version.removeprefix("==")
            example = data.Example(args.library, version, "", args.update.strip(), code, "")
            tasks.append(Task(source, piece, code, data.encode_prompt(example, tokenizer)))
    return tasks


def admit(task, tokenizer, context, settings, args):
    """Set how long the answers may be; False, with an error, where the model cannot be asked."""
    size = len(tokenizer.encode(task.code, **PLAIN))
    task.room = context - len(task.prompt)
    usual = max(settings.get("max_new_tokens", 1024), 2 * size)
    task.limit = min(args.max_new_tokens or usual, task.room)
    if re.search("^```|</answer>", task.code, re.MULTILINE):
        fault = "has </answer> or ``` at the start of a line, which end an answer"
    elif len(task.code) > reward.MAX_CODE:
        fault = f"has {len(task.code):,} characters, and an answer at most {reward.MAX_CODE:,}"
    elif size > task.room:
        fault = f"no room for the answer in the context of {context:,} tokens"
    else:
        return True
    task.source.errors.append(f"{task.source.name}: {task.piece.name}: {fault}; left alone")
    return False


def sample(model, tokenizer, tasks, args):
    """Set the answers of all tasks, in batches, the longest first."""
    n = args.num_samples if args.temperature else 1  # greedy answers are equal: no agreement
    todo = sorted(tasks, key=lambda task: -len(task.prompt) - task.limit)
    with tqdm(total=len(tasks), unit="piece", leave=False, disable=None) as bar:

        def progress(token, finished):
            text = f"token {token} of {limit}, {finished} of {len(batch) * n} answers finished"
            bar.set_postfix_str(text)

        while todo:
            count = max(1, BATCH // (n * (len(todo[0].prompt) + todo[0].limit)))
            batch, todo = todo[:count], todo[count:]
            prompts = [task.prompt for task in batch]
            limit = min(max(task.limit for task in batch), *[task.room for task in batch])
            settings = n, limit, args.temperature, [args.seed] * len(batch)
            found = rollout.sample_answers(model, tokenizer, prompts, *settings, progress=progress)
            for i, task in enumerate(batch):
                task.answers = found[i * n : (i + 1) * n]
            bar.update(len(batch))


def say(source, pieces, still_named):
    """Say on stderr what became of a file, and what to check in it."""
    lines = []
    if pieces:
        changed = sum(piece["changed"] for piece in pieces)
        agreed = [piece["agreement"] for piece in pieces if piece["agreement"] is not None]
        agreement = f", lowest agreement {min(agreed):.2f}" if agreed else ""
        lines.append(f"{changed} of {len(pieces)} pieces changed{agreement}")
    elif not source.errors:
        lines.append("names nothing of the notes, left alone")
    for piece in pieces:
        if not piece["usable"]:
            found = [f"{count} refused, as {why}" for why, count in piece["dropped"].items()]
            text = f"{piece['name']}: no answer is usable: {', '.join(found)}"
            lines.append(f"warning: {text}; try another --seed, --max-new-tokens or --model")
    if pieces and still_named:
        names = ", ".join(still_named) + " (fine if meant to stay)"
        lines.append(f"warning: named in the note and still in the code: {names}")
    lines = [f"{source.name}: {line}" for line in lines] + [f"error: {x}" for x in source.errors]
    print("\n".join(lines), file=sys.stderr)


def report(source, pieces, args):
    """Write the new file, or print its diff or JSON object; say what to check."""
    diff = sources.unified(source)
    if args.write and diff:
        sources.save(source)
    old, new = [answers.identifiers(code, args.library) for code in (source.text, source.new)]
    still_named = sorted(name for name in old & new & reward.words(args.update) if len(name) > 2)
    say(source, pieces, still_named)
    if args.json:
        found = {"file": source.name, "path": source.path, "changed": bool(diff)}
        found |= {"code": source.new, "encoding": source.encoding, "errors": source.errors}
        found |= {"diff": diff.decode(source.encoding, "replace"), "still_named": still_named}
        print(json.dumps(found | {"pieces": pieces}))
    elif not args.write:
        sys.stdout.buffer.write(diff)  # its own bytes, whatever the terminal's encoding


def parse_migration(argv):
    """The checked command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="Python file, directory, or - for stdin")
    add("--library", required=True, metavar="X", help="name of the library (required)")
    add("--version", required=True, metavar="X", help="its new version (required)")
    note = parser.add_mutually_exclusive_group(required=True)
    note.add_argument("--update", metavar="X", help="what changed (this or the next is required)")
    note.add_argument("--update-file", metavar="X", help="the same from a file, e.g. a changelog")
    add("--model", default=TINY, metavar="X", help="run, checkpoint or hub id [tiny, a toy]")
    add("--num-samples", default=8, type=int, metavar="X", help="answers to choose from [8]")
    add("--temperature", default=0.8, type=float, metavar="X", help="0: one greedy answer [0.8]")
    text = "a class of more is cut into methods; 0: whole files are pieces [256]"
    add("--max-piece-tokens", default=256, type=int, metavar="X", help=text)
    add("--max-new-tokens", type=int, metavar="X", help="[as in training, or twice the piece]")
    add("--seed", default=42, type=int, metavar="X", help="of the answers [42]")
    add("--dtype", default="auto", choices=CHOICES["dtype"], help="of frozen weights [auto]")
    add("--all", action="store_true", help="ask for all pieces, whatever they name [off]")
    add("--write", action="store_true", help="change the files if git has them as they are [off]")
    add("--force", action="store_true", help="let --write change other files, too [off]")
    add("--json", action="store_true", help="print a JSON object for each file, no patch [off]")
    args = parser.parse_args(argv)
    if min(args.num_samples, args.max_new_tokens or 1) < 1:
        raise BadInput("--num-samples and --max-new-tokens must be at least 1")
    if not 0 <= args.temperature < math.inf or not 0 <= args.seed < 2**32:
        raise BadInput("--temperature must be at least 0, --seed in [0, 2**32)")
    if args.update is None:
        args.update = read_text(args.update_file)
    args.update = unix_lines(args.update)
    for text in (*args.files, args.library, args.version, args.update):
        if not text.strip() or re.search("[\ud800-\udfff]", text):
            raise BadInput("file, --library, --version, --update: empty, or not valid Unicode")
    if args.model == TINY:
        text = "note: without --model a toy answers, which knows made-up libraries only"
        print(text, file=sys.stderr)
    return args


def ask(tasks, tokenizer, args):
    """Load the model and set the answers of all tasks; those it cannot be asked become errors."""
    base, adapter, settings = open_policy(args.model)
    model = loading.load_policy(base, adapter, args.dtype)
    setup.check_policy(model, tokenizer, base)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    context = min(context, setup.exact_length(model.config))
    possible = [task for task in tasks if admit(task, tokenizer, context, settings, args)]
    sample(model, tokenizer, possible, args)


def main(argv=None):
    """Migrate files; the exit status."""
    args = parse_migration(argv)
    tokenizer = loading.load_tokenizer(open_policy(args.model)[0])
    files = sources.find(args.files)
    tasks = []
    for source in files:
        try:
            sources.read(source)
            found = find_tasks(source, tokenizer, args)
            if found and args.write and not args.force:
                sources.check_clean(source)
            tasks += found
        except BadInput as error:
            source.errors.append(str(error))
    if tasks:
        ask(tasks, tokenizer, args)
    changed = unusable = 0
    for source in files:
        mine = [task for task in tasks if task.source is source and task.answers]
        pieces = answers.settle(source, [(task.piece, task.answers) for task in mine])
        report(source, pieces, args)
        changed += source.new != source.text
        unusable += any(not piece["usable"] for piece in pieces)
    bad = sum(bool(source.errors) for source in files)
    if len(files) > 1:
        print(f"{len(files)} files: {changed} changed, {bad} with errors", file=sys.stderr)
    if bad:
        return 2
    if unusable and not changed:
        return 3
    return int(changed > 0)


if __name__ == "__main__":
    parallel.run_main(main)
