"""Rewrite a Python file for a new version of a library, as the update notes say, and print the diff.

    python migrate.py old.py --model runs/grpo --library numpy --version 2.0 \\
        --update "np.in1d was removed; use np.isin"
    git show HEAD:old.py | python migrate.py - --library numpy --version 2.0 --update-file notes.txt

The model answers several times. Answers without code, or whose code does not parse, are left out;
of the others the one is taken that they agree with most. Read the diff before you trust it: nothing
is run. The exit status is 0 if there is nothing to change, 1 if there is, 2 for bad input, 3 if no
answer is usable.
"""

import contextlib
import difflib
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean as mean

import data
import recode
import reward
from training import loading, parallel
from training.config import BadInput, Parser
from training.run import style


BLANK = "\ufeff \t\r\n\f"  # may stand around the code


def read_text(name):
    """The text of a file, of stdin for "-", exactly as it is. BadInput if it is not UTF-8 or cannot be read."""
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 at byte {error.start}; save it as UTF-8 first")
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {error.strerror}")


def read_code(name):
    """The text of a Python file as it is, and its code as a model is to see it. BadInput where that cannot be."""
    text = read_text(name)
    code = re.sub("\r\n?", "\n", text.strip(BLANK))
    if not reward.strip_comments(code):
        raise BadInput(f"{name}: no code in it; give a Python file")
    if not reward.parses(code):
        raise BadInput(f"{name}: does not parse as Python {sys.version_info[0]}.{sys.version_info[1]}; mend it first")
    if "\n```" in code or "</answer>" in code:
        raise BadInput(f"{name}: has ``` at the start of a line or </answer>, where an answer would end; take that out")
    if len(set(re.findall("\r\n|\r|\n", text))) > 1:
        raise BadInput(f"{name}: mixes line endings; make them one kind first, with dos2unix say")
    return text, code


def splice(text, code):
    """`text`, a whole file, with other code: its line endings and what stands around the code stay."""
    head, _, tail = text.partition(text.strip(BLANK))
    ending = re.search("\r\n|\r|\n|$", text)[0] or "\n"
    return head + code.replace("\n", ending) + tail


def unified(old, new, name):
    """The diff of two texts as `patch` and `git apply` take it, list of lines; none if they are equal."""
    parts = [re.findall("[^\n]*\n|[^\n]+", text) for text in (old, new)]  # splitlines() would part at form feeds too
    lines = difflib.unified_diff(*parts, name, name)
    return [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]


def check_writable(name):
    """BadInput where overwrite() would fail, before the model is put to work."""
    path = Path(os.path.realpath(name))
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise BadInput(f"--write: no right to write {path} or in its directory; leave --write out and keep the diff")


def beside(path, ending, content):
    """Write bytes into a new file beside `path`, with its rights: old.py.bak, or old.py.bak1 where that exists."""
    for number in itertools.count():
        fresh = path.with_name(f"{path.name}{ending}{number or ''}")
        with contextlib.suppress(FileExistsError):
            file = open(fresh, "xb")
            break
    try:
        with file:
            shutil.copymode(path, fresh)
            with contextlib.suppress(PermissionError, AttributeError):  # only root gives files away; no Windows does
                os.chown(fresh, path.stat().st_uid, path.stat().st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        fresh.unlink()
        raise
    return fresh


def overwrite(path, old, new):
    """Put the text `new` in the place of `old`, in one step and through links; the path of the copy it keeps."""
    path = Path(os.path.realpath(path))
    try:
        if path.read_bytes() != old.encode():
            raise BadInput(f"{path}: was changed while the model was at work; start again")
        aside = beside(path, ".new", new.encode())
        try:
            backup = beside(path, ".bak", old.encode())
            os.replace(aside, path)
        except OSError:
            aside.unlink()
            raise
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; it is as it was")
    return backup


def agreement(codes):
    """How much the others resemble each code, list[float]: the mean ES to them, comments aside; 0.0 without others."""
    codes = [reward.strip_comments(code) for code in codes]
    others = [[reward.similarity(a, b) for j, b in enumerate(codes) if j != i] for i, a in enumerate(codes)]
    return [mean(row) if row else 0.0 for row in others]


def migrate(model, tokenizer, example, num_samples, max_new_tokens, temperature=0.8, seed=0):
    """The new code of `example`, whose new_code is not looked at, and how it was found: (str or None, dict).

    Of `num_samples` answers those without code or that do not parse are left out. Of the others that
    one is taken which they agree with most, and of equals the likeliest. None if no answer is left.
    """
    prompt = data.encode_prompt(example, tokenizer)
    answers = recode.sample_answers(
        model, tokenizer, [prompt], num_samples, max_new_tokens, temperature, seed
    )
    _, texts, cut, logps = zip(*answers)
    codes = [reward.extract_code(text) or "" for text in texts]
    some = [i for i, code in enumerate(codes) if reward.strip_comments(code)]
    usable = [i for i in some if reward.parses(codes[i])]
    shares = agreement([codes[i] for i in usable])
    best = max(zip(shares, (logps[i] for i in usable), usable), default=(None, None, None))
    details = {
        "answers": num_samples, "usable": len(usable), "without_code": num_samples - len(some),
        "not_parsed": len(some) - len(usable), "cut": sum(cut),
        "agreement": best[0] if len(usable) > 1 else None,
    }  # fmt: skip
    return codes[best[2]] if usable else None, details


def parse_migration(argv):
    """The checked arguments of this file as a program."""
    parser = Parser(__doc__)
    parser.add_argument("file", help="Python file to migrate, - for stdin")
    group = parser.add_argument_group("what changed")
    group.add_argument("--library", required=True, metavar="X", help="name of the library (required)")
    group.add_argument("--version", required=True, metavar="X", help="its new version (required)")
    notes = group.add_mutually_exclusive_group(required=True)
    notes.add_argument("--update", metavar="TEXT", help="what changed, in words (this or the next is required)")
    notes.add_argument("--update-file", metavar="FILE", help="the same from a file: release notes, say")
    group = parser.add_argument_group("who answers")
    group.add_argument("--model", metavar="X", help="run directory, checkpoint directory or hub id [tiny, a toy]")
    group.add_argument("--num-samples", default=8, type=int, metavar="X", help="answers to choose from [8]")
    group.add_argument("--temperature", default=0.8, type=float, metavar="X", help="of the answers, 0 is greedy [0.8]")
    group.add_argument("--max-prompt-tokens", type=int, metavar="X", help="longer is refused [what the model can take]")
    text = "longer answers are cut [as in training, or twice the file if that is more]"
    group.add_argument("--max-new-tokens", type=int, metavar="X", help=text)
    group.add_argument("--seed", default=42, type=int, metavar="X", help="of the answers [42]")
    group = parser.add_argument_group("what becomes of it")
    group.add_argument("--write", action="store_true", help="change the file; a copy stays in FILE.bak [off]")
    group.add_argument("--json", action="store_true", help="one JSON object in place of the diff [off]")
    args = parser.parse_args(argv)
    if min(args.num_samples, args.max_new_tokens or 1, args.max_prompt_tokens or 1) < 1:
        raise BadInput("--num-samples, --max-new-tokens and --max-prompt-tokens must be at least 1")
    if not 0 <= args.temperature < math.inf or not 0 <= args.seed < 2**32:
        raise BadInput("--temperature must be at least 0, --seed in [0, 2**32)")
    args.num_samples = args.num_samples if args.temperature else 1  # all would be equal, and that is no agreement
    if args.write and args.file == "-":
        raise BadInput("--write: there is no file to write when the code comes from stdin")
    args.update = read_text(args.update_file) if args.update is None else args.update
    for flag, value in (("--library", args.library), ("--version", args.version), ("the update", args.update)):
        if not value.strip() or re.search("[\ud800-\udfff]", value):
            raise BadInput(f"{flag}: empty, or not valid Unicode; say what changed in which library")
    if args.model is None:
        print("note: without --model the embedded toy answers, which knows made-up libraries only", file=sys.stderr)
        args.model = os.path.relpath(Path(__file__).parent / "tiny")
    return args


def room(model, tokenizer, example, settings, args):
    """How many tokens an answer may have, at most what the model's context leaves. BadInput for too long a prompt."""
    prompt, code = len(data.encode_prompt(example, tokenizer)), len(tokenizer.encode(example.old_code))
    if args.max_prompt_tokens and prompt > args.max_prompt_tokens:
        raise BadInput(f"the prompt has {prompt:,} tokens, --max-prompt-tokens {args.max_prompt_tokens:,} at most")
    context = getattr(model.config, "max_position_embeddings", math.inf)
    new = args.max_new_tokens or min(max(settings.get("max_new_tokens", 1024), 2 * code), context - prompt)
    if prompt + max(new, code) > context:
        raise BadInput(f"the prompt has {prompt:,} tokens: no room for the answer in {context:,}; give less at a time")
    return new


def report(args, text, code, details):
    """Print what came out of a migration, write it if asked to, and return the exit status."""
    after = text if code is None else splice(text, code)
    lines = unified(text, after, "stdin" if args.file == "-" else args.file)
    backup = overwrite(args.file, text, after) if args.write and lines else None
    if args.json:
        known = {name: vars(args)[name] for name in ("file", "library", "version", "model")}
        found = {"changed": bool(lines), "code": None if code is None else after, "diff": "".join(lines)}
        print(json.dumps(known | found | {"backup": backup and str(backup)} | details))
    else:
        colours = {"+": "32", "-": "31", "@": "36"}
        print("".join(style(line, colours[line[0]]) if line[0] in colours else line for line in lines), end="")
    counts = f"{details['without_code']} without code, {details['not_parsed']} that do not parse"
    if code is None:
        way_out = "raise --max-new-tokens" if details["cut"] else "try another --seed or --model"
        print(f"error: no answer is usable: {counts}, {details['cut']} cut; {way_out}", file=sys.stderr)
        return 3
    agree = "" if details["agreement"] is None else f", agreement {details['agreement']:.2f}"
    print(f"{details['usable']} of {details['answers']} answers are usable{agree}", file=sys.stderr)
    if backup:
        print(f"written; the old one is {backup}", file=sys.stderr)
    elif not lines:
        print("the answer equals the file: nothing to change", file=sys.stderr)
    return 1 if lines else 0


def main(argv=None):
    """Migrate a file. The exit status: 0 nothing to change, 1 changed, 3 no answer is usable."""
    args = parse_migration(argv)
    text, code = read_code(args.file)
    if args.write:
        check_writable(args.file)
    example = data.Example(args.library, args.version.removeprefix("=="), "", args.update.strip(), code, "")
    base, adapter, settings = loading.open_policy(args.model)
    tokenizer, model = loading.load_tokenizer(base), loading.load_policy(base, adapter)
    new_tokens = room(model, tokenizer, example, settings, args)
    code, details = migrate(model, tokenizer, example, args.num_samples, new_tokens, args.temperature, args.seed)
    return report(args, text, code, details)


if __name__ == "__main__":
    parallel.run_main(main)
