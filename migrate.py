"""Rewrite a Python file for a new version of a library, following update notes; print the diff.

    python migrate.py old.py --model runs/7b --library numpy --version 2.0 \\
        --update "np.in1d was removed; use np.isin" > migration.patch
    git show HEAD:old.py | python migrate.py - --library numpy --version 2.0 --update-file notes.txt

The model answers several times. Answers without code, or whose code does not parse, are dropped;
of the others, the one most similar to the rest is taken. Nothing is run and no file is changed:
read the diff and the warnings, then apply it with `git apply` or `patch -p1` at the root of the
git work tree; outside git, in the current directory. If it is another one, stderr names it.

Exit status: 0 nothing to change, 1 changed, 2 bad input, 3 no usable answer.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

import data
import reward
import rollout
from lib import loading, parallel
from lib.config import CHOICES, TINY, BadInput, Parser, open_policy
from lib.files import diff_path, read_text, unified, unix_lines
from tasks.migration import review
from training import setup
from training.screen import style

BLANK = "\ufeff \t\r\n\f"  # may surround the code, and is kept


def read_code(name):
    """(text, code): the exact text of a Python file, and its code as the model sees it."""
    if name != "-" and Path(name).suffix not in (".py", ".pyi"):
        raise BadInput(f"{name}: not a .py or .pyi file; other Python code can come from stdin")
    text = read_text(name)
    code = re.sub("\r\n?", "\n", text.strip(BLANK))
    if code.startswith("{") and '"nbformat"' in code:  # JSON that often parses as Python
        raise BadInput(f"{name}: a notebook; convert it with jupyter nbconvert --to script")
    if not reward.strip_comments(code):
        raise BadInput(f"{name}: no code in it; give a Python file")
    if not reward.parses(code):
        raise BadInput(f"{name}: does not parse as Python {sys.version.split()[0]}; fix it first")
    if "\n```" in code or "</answer>" in code:
        raise BadInput(f"{name}: has </answer> or ``` at the start of a line, which end an answer")
    if len(set(re.findall("\r\n|\r|\n", text))) > 1:
        raise BadInput(f"{name}: mixes line endings; unify them first, e.g. with dos2unix")
    return text, code


def splice(text, code):
    """`text` with other code: its line endings and what surrounds the code are kept."""
    ending = re.search("\r\n|\r|\n|$", text)[0] or "\n"
    return text.replace(text.strip(BLANK), code.replace("\n", ending))


def migrate(model, tokenizer, example, num_samples, max_new_tokens, temperature=0.8, seed=0):
    """(new code or None, how it was found); `example.new_code` is not used.

    Of the usable answers, the one with the highest mean edit similarity to the others is taken,
    comments aside; ties go to the most likely one.
    """
    prompts = [data.encode_prompt(example, tokenizer)]
    settings = num_samples, max_new_tokens, temperature, seed
    hidden = os.environ.get("TERM") == "dumb"
    form = "{n_fmt} of at most {total_fmt} tokens{postfix}, {elapsed}, at most {remaining} left"
    with tqdm(total=max_new_tokens, bar_format=form, leave=False, disable=hidden or None) as line:

        def progress(token, finished):
            line.set_postfix_str(f"{finished} of {num_samples} answers finished", refresh=False)
            line.update()

        answers = rollout.sample_answers(model, tokenizer, prompts, *settings, progress=progress)
    codes = [reward.extract_code(answer.text) or "" for answer in answers]
    plain = [reward.strip_comments(code) for code in codes]
    usable = [i for i, code in enumerate(codes) if plain[i] and reward.parses(code)]
    ranked = []
    for i in usable:
        others = sum(reward.similarity(plain[i], plain[j]) for j in usable) - 1  # 1: to itself
        ranked.append((others / max(len(usable) - 1, 1), answers[i].logp, codes[i]))
    agreement, _, code = max(ranked, default=(None, None, None))
    details = {
        "answers": num_samples, "usable": len(usable), "without_code": plain.count(""),
        "not_parsed": len(plain) - plain.count("") - len(usable),
        "cut": sum(answer.cut for answer in answers),
        "agreement": agreement if len(usable) > 1 else None,
    }  # fmt: skip
    return code, details


def parse_migration(argv):
    """The checked command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", help="Python file to migrate (.py, .pyi), - for stdin")
    add("--library", required=True, metavar="X", help="name of the library (required)")
    add("--version", required=True, metavar="X", help="its new version (required)")
    note = parser.add_mutually_exclusive_group(required=True)
    note.add_argument("--update", metavar="X", help="what changed (this or the next is required)")
    note.add_argument("--update-file", metavar="X", help="the same from a file, e.g. a changelog")
    add("--model", metavar="X", help="run directory, checkpoint directory or hub id [tiny, a toy]")
    add("--num-samples", default=8, type=int, metavar="X", help="answers to choose from [8]")
    add("--temperature", default=0.8, type=float, metavar="X", help="0: one greedy answer [0.8]")
    add("--max-prompt-tokens", type=int, metavar="X", help="longer is refused [model's context]")
    text = "longer answers are cut [as in training, or twice the file if that is more]"
    add("--max-new-tokens", type=int, metavar="X", help=text)
    add("--seed", default=42, type=int, metavar="X", help="of the answers [42]")
    add("--dtype", default="auto", choices=CHOICES["dtype"], help="of frozen weights [auto]")
    add("--json", action="store_true", help="print one JSON object instead of the diff [off]")
    args = parser.parse_args(argv)
    if min(args.num_samples, args.max_new_tokens or 1, args.max_prompt_tokens or 1) < 1:
        raise BadInput("--num-samples, --max-new-tokens and --max-prompt-tokens: at least 1")
    if not 0 <= args.temperature < math.inf or not 0 <= args.seed < 2**32:
        raise BadInput("--temperature must be at least 0, --seed in [0, 2**32)")
    if args.temperature == 0:
        args.num_samples = 1  # all would be equal, and that is no agreement
    if args.update is None:
        args.update = read_text(args.update_file)
    args.update = unix_lines(args.update)
    for text in (args.file, args.library, args.version, args.update):
        if not text.strip() or re.search("[\ud800-\udfff]", text):
            raise BadInput("file, --library, --version, --update: empty, or not valid Unicode")
    if args.model is None:
        text = "note: without --model a toy answers, which knows made-up libraries only"
        print(text, file=sys.stderr)
        args.model = TINY
    return args


def answer_limit(model, tokenizer, example, settings, args):
    """The most tokens an answer may have. BadInput if the prompt leaves no room for it."""
    prompt = len(data.encode_prompt(example, tokenizer))
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    code = len(tokenizer.encode(example.old_code, **plain))
    longest = args.max_prompt_tokens or math.inf
    if prompt > longest:
        raise BadInput(f"the prompt has {prompt:,} tokens, --max-prompt-tokens {longest} at most")
    context = getattr(model.config, "max_position_embeddings", math.inf)
    context = min(context, setup.exact_length(model.config))
    usual = max(settings.get("max_new_tokens", 1024), 2 * code)
    limit = args.max_new_tokens or min(usual, context - prompt)
    if prompt + max(limit, code) > context:
        raise BadInput(f"{prompt:,} prompt tokens leave no room for the answer in {context:,}")
    return limit


def report(found):
    """Print the diff or the JSON object, and on stderr what to check; return the exit status."""
    colours = {"+": "32", "-": "31", "@": "36"}
    lines = found["diff"].split("\n")
    diff = "\n".join(style(x, colours[x[0]]) if x[:1] in colours else x for x in lines)
    print(json.dumps(found) + "\n" if found["json"] else diff, end="")
    if found["code"] is None:
        counts = "{without_code} without code, {not_parsed} that do not parse, {cut} cut"
        way_out = "raise --max-new-tokens" if found["cut"] else "try another --seed or --model"
        print(f"error: no answer is usable: {counts.format(**found)}; {way_out}", file=sys.stderr)
        return 3
    agree = f", agreement {found['agreement']:.2f}" if found["usable"] > 1 else ""
    print(f"{found['usable']} of {found['answers']} answers are usable{agree}", file=sys.stderr)
    if found["still_named"]:
        names = ", ".join(found["still_named"]) + " (fine if meant to stay)"
        print(f"warning: named in the note and still in the code: {names}", file=sys.stderr)
    lost = []
    for kind in ("definition", "comment", "docstring"):
        items = found[f"lost_{kind}s"]
        names = f" ({', '.join(items)})" if kind == "definition" else ""
        if items:
            lost.append(f"{len(items)} {kind}{'s' if len(items) > 1 else ''}{names}")
    if lost:
        print(f"warning: the new code lacks {', '.join(lost)} of the old code", file=sys.stderr)
    if not found["changed"]:
        print("the answer equals the file: nothing to change", file=sys.stderr)
    return int(found["changed"])


def main(argv=None):
    """Migrate a file; the exit status."""
    args = parse_migration(argv)
    text, code = read_code(args.file)
    path = diff_path(args.file)
    version = args.version.removeprefix("==")
    example = data.Example(args.library, version, "", args.update.strip(), code, "")
    base, adapter, settings = open_policy(args.model)
    tokenizer = loading.load_tokenizer(base)
    model = loading.load_policy(base, adapter, args.dtype)
    setup.check_policy(model, tokenizer, base)
    limit = answer_limit(model, tokenizer, example, settings, args)
    sampling = args.num_samples, limit, args.temperature, args.seed
    new_code, details = migrate(model, tokenizer, example, *sampling)
    new_text = text if new_code is None else splice(text, new_code)
    diff = unified(text, new_text, path)
    result = {"changed": bool(diff), "code": None if new_code is None else new_text, "diff": diff}
    return report(vars(args) | result | review(example, new_code or code) | details)


if __name__ == "__main__":
    parallel.run_main(main)
