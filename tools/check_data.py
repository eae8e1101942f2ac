"""Checks a data set of your own before you train on it.

    python -m tools.check_data my.jsonl --model Qwen/Qwen2.5-Coder-7B-Instruct
    python -m tools.check_data my.jsonl --split 0.1 mine    also write the split into mine/

Prints how many rows are usable, which are dropped and why, how many tokens prompts and references
have, and three prompts as the model sees them. A split is that of a run with --heldout 0.1, in
train.jsonl and heldout.jsonl; unrelated.jsonl has up to 100 held-out codes, each with a held-out
note that does not concern it, so the right answer is the old code. --contrast N adds N such rows,
made of training rows, to train.jsonl.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

import grpo
from data import encode_prompt, encode_target, split_heldout
from lib import loading, parallel
from lib.config import TINY, BadInput, Parser, open_policy, parse_config
from lib.files import write
from reward import parses, strip_comments, words
from tasks.answers import identifiers
from training.screen import excerpt
from training.setup import load_examples

UNRELATED = 100  # rows of unrelated.jsonl


def lengths(name, texts, flag, limit):
    """A line about token counts: median, 90th percentile, maximum, and how many exceed a limit."""
    counts = np.array([len(ids) for ids in texts])
    most = np.quantile(counts, 0.9, method="higher")
    line = f"{name:<10}{np.median(counts):8,.0f}{most:8,}{counts.max():8,}"
    return f"{line}{(counts > limit).sum():10,} over {flag} {limit:,}"


def unrelated(examples, count, seed):
    """Up to `count` examples with the note of another one of their library, which names nothing in
    the code: they ask for no change.
    """
    rng = random.Random(seed)
    found = []
    for example in rng.sample(examples, len(examples)):
        code = example.old_code
        library = example.dependency.lower()
        if len(found) < count and parses(code):
            used = identifiers(code, library)
            same = [other for other in examples if other.dependency.lower() == library]
            notes = [other for other in same if not used & words(other.update_info)]
            if notes:
                found.append(replace(rng.choice(notes), old_code=code, new_code=code))
    return found


def write_split(examples, share, directory, contrast, seed):
    """Write a split as by a run's --heldout into a new directory: train, heldout, unrelated."""
    if Path(directory).exists():
        raise BadInput(f"--split {directory}: exists already; give a new directory")
    train, heldout = split_heldout(share, examples, seed)
    added = unrelated(train, contrast, seed)
    if len(added) < contrast:
        raise BadInput(f"--contrast {contrast}: the training rows give {len(added):,} at most")
    none = unrelated(heldout, UNRELATED, seed)
    for name, some in (("train", train + added), ("heldout", heldout), ("unrelated", none)):
        path = Path(directory) / f"{name}.jsonl"
        write(path, b"".join(json.dumps(vars(example)).encode() + b"\n" for example in some))
        print(f"split     {path}: {len(some):,} rows")


def main(argv=None):
    """Check a data set. The exit status is 0 if it has a usable row."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", help="JSONL file or hub id of the migration examples")
    add("--model", default=TINY, metavar="X", help="run, checkpoint or hub id [tiny, the toy]")
    add("--split", nargs=2, metavar=("SHARE", "DIRECTORY"), help="write a split there [off]")
    add("--contrast", type=int, default=0, metavar="N", help="rows added to train.jsonl [0]")
    args = parser.parse_args(argv)
    if args.contrast < 0 or (args.contrast and not args.split):
        raise BadInput(f"--contrast {args.contrast}: at least 0, and only with --split")
    config = parse_config(grpo.Config, ["--model", args.model], "")
    base, _, _ = open_policy(args.model)
    tokenizer = loading.load_tokenizer(base)
    examples = load_examples(args.data)
    same = sum(strip_comments(e.old_code) == strip_comments(e.new_code) for e in examples)
    print(f"          {same:,} usable rows ask for no change, comments aside")
    if args.split:
        write_split(examples, *args.split, args.contrast, config.seed)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    targets = [encode_target(example, tokenizer) for example in examples]
    print(f"\n{'tokens':<10}{'median':>8}{'90 %':>8}{'longest':>8}    by the tokenizer of {base}")
    print(lengths("prompt", prompts, "--max-prompt-tokens", config.max_prompt_tokens))
    print(lengths("reference", targets, "--max-new-tokens", config.max_new_tokens))
    for i in sorted({0, len(prompts) // 2, len(prompts) - 1}):
        print(f"\nprompt of usable row {i + 1:,}, without its reference:")
        print(excerpt(tokenizer.decode(prompts[i]), 40))
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
