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
import statistics
from pathlib import Path

from data import encode_prompt, encode_target, load_examples, split_heldout, unrelated
from lib import loading, parallel
from lib.config import TINY, BadInput, Parser, Settings, open_policy
from lib.files import write
from reward import strip_comments
from training.screen import excerpt


def lengths(name, counts, limit, flag):
    """A line about token counts: median, 90th percentile, maximum, and how many exceed a limit."""
    counts = sorted(counts)
    most = counts[-(-9 * len(counts) // 10) - 1]  # at least 90 % are no longer
    over = sum(count > limit for count in counts)
    line = f"{name:<10}{statistics.median(counts):8,.0f}{most:8,}{counts[-1]:8,}"
    return f"{line}{over:10,} over {flag} {limit:,}"


def usable(source):
    """The usable examples of a source; prints how many rows are dropped, where and why."""
    dropped = {}
    examples = load_examples(source, dropped)
    total = sum(map(len, dropped.values()))
    print(f"data      {source}: {len(examples):,} usable rows, {total:,} dropped")
    for reason, places in dropped.items():
        lines = ", ".join(place.rpartition(" ")[2] for place in places[:5])
        more = ", ..." if len(places) > 5 else ""
        print(f"          {len(places):,} dropped: {reason} (line {lines}{more})")
    same = [strip_comments(e.old_code) == strip_comments(e.new_code) for e in examples]
    if any(same):
        print(f"          {sum(same):,} usable rows ask for no change, comments aside")
    return examples


UNRELATED = 100  # rows of unrelated.jsonl


def write_split(examples, share, directory, contrast):
    """Write a split as by a run's --heldout into a new directory: train, heldout, unrelated."""
    if Path(directory).exists():
        raise BadInput(f"--split {directory}: exists already; give a new directory")
    train, heldout = split_heldout(share, examples, Settings.seed)
    added = unrelated(train, contrast, Settings.seed)
    if len(added) < contrast:
        raise BadInput(f"--contrast {contrast}: the training rows give {len(added):,} at most")
    files = {"train": train + added, "heldout": heldout}
    files["unrelated"] = unrelated(heldout, UNRELATED, Settings.seed)
    for name, some in files.items():
        path = Path(directory) / f"{name}.jsonl"
        write(path, b"".join(json.dumps(vars(example)).encode() + b"\n" for example in some))
        print(f"split     {path}: {len(some):,} rows")


def main(argv=None):
    """Check a data set. The exit status is 0 if it has a usable row."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", help="JSONL file or hub id of the migration examples")
    add("--model", default=TINY, metavar="X", help="run, checkpoint or hub id [tiny, the toy]")
    add("--max-prompt-tokens", type=int, metavar="X", help="limit [the checkpoint's, or 2048]")
    add("--max-new-tokens", type=int, metavar="X", help="limit [the checkpoint's, or 1024]")
    add("--split", nargs=2, metavar=("SHARE", "DIRECTORY"), help="write a split there [off]")
    text = "also train on N rows whose note does not concern the code [0]"
    add("--contrast", type=int, default=0, metavar="N", help=text)
    args = parser.parse_args(argv)
    if args.contrast < 0 or (args.contrast and not args.split):
        raise BadInput(f"--contrast {args.contrast}: at least 0, and only with --split")
    base, _, settings = open_policy(args.model)
    tokenizer = loading.load_tokenizer(base)
    examples = usable(args.data)
    if args.split:
        write_split(examples, *args.split, args.contrast)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    targets = [encode_target(example, tokenizer) for example in examples]
    prompt_limit = args.max_prompt_tokens or settings.get("max_prompt_tokens", 2048)
    target_limit = args.max_new_tokens or settings.get("max_new_tokens", 1024)
    print(f"\n{'tokens':<10}{'median':>8}{'90 %':>8}{'longest':>8}    by the tokenizer of {base}")
    print(lengths("prompt", map(len, prompts), prompt_limit, "--max-prompt-tokens"))
    print(lengths("reference", map(len, targets), target_limit, "--max-new-tokens"))
    for i in sorted({0, len(prompts) // 2, len(prompts) - 1}):
        print(f"\nprompt of usable row {i + 1:,}, without its reference:")
        print(excerpt(tokenizer.decode(prompts[i]), 40))
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
