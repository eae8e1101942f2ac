"""Check a data set of your own.

    python -m tools.check_data my.jsonl --model Qwen/Qwen2.5-Coder-7B-Instruct

How many rows are usable, what is dropped, where and why, how long prompts and references are for
the tokenizer of that model; and three prompts as a model sees them.
"""

import os
import statistics
import textwrap
from pathlib import Path

import reward
from data import encode_prompt, encode_target, locate, sift
from training import loading, parallel
from training.config import BadInput, Parser


def lengths(name, counts, limit, flag):
    """A line about token counts: median, 90 % of them, the longest, and how many are over a limit."""
    counts = sorted(counts)
    most = counts[-(-9 * len(counts) // 10) - 1]  # at least nine in ten are no longer
    line = f"{name:<10}{statistics.median(counts):8,.0f}{most:8,}{counts[-1]:8,}"
    over = sum(count > limit for count in counts)
    return f"{line}{over:10,} over {flag} {limit:,}"


def shown(prompt, lines=40):
    """A prompt for the screen: at most so many lines of at most 94 characters, nothing that a terminal obeys."""
    clean = ("".join(char if char.isprintable() else "?" for char in line) for line in prompt.expandtabs(4).split("\n"))
    found = [part for line in clean for part in textwrap.wrap(line, 94, drop_whitespace=False) or [""]]
    found = found if len(found) <= lines else [*found[: lines - 1], f"... and {len(found) - lines + 1} lines more"]
    return "\n".join(f"    | {line}" for line in found)


def check(source, tokenizer, max_prompt_tokens, max_new_tokens):
    """Print what a data set holds and what of it is left out, with its first lines; its usable examples."""
    examples, dropped = [], {}
    for where, example, reason in sift(locate(source)):
        if example:
            examples.append(example)
        else:
            dropped.setdefault(reason, []).append(where.rpartition(" ")[2])
    print(f"data      {source}: {len(examples):,} usable rows, {sum(map(len, dropped.values())):,} dropped")
    for reason, numbers in dropped.items():
        more = ", ..." if len(numbers) > 5 else ""
        print(f"          {len(numbers):,} dropped: {reason} (line {', '.join(numbers[:5])}{more})")
    if not examples:
        raise BadInput(f"data: no usable row in {source!r}; a row needs a library, an update note, old and new code")
    same = sum(reward.strip_comments(e.old_code) == reward.strip_comments(e.new_code) for e in examples)
    if same:
        print(f"          {same:,} usable rows ask for no change: but for comments, new code and old are equal")
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    targets = [encode_target(example, tokenizer) for example in examples]
    print(f"\n{'tokens':<10}{'median':>8}{'90 %':>8}{'longest':>8}")
    print(lengths("prompt", map(len, prompts), max_prompt_tokens, "--max-prompt-tokens"))
    print(lengths("reference", map(len, targets), max_new_tokens, "--max-new-tokens"))
    for i in sorted({0, len(prompts) // 2, len(prompts) - 1}):
        print(f"\nprompt of usable row {i + 1:,}, its reference not shown to the model:")
        print(shown(tokenizer.decode(prompts[i])))
    return examples


def main(argv=None):
    """Check a data set. The exit status is 0 if it has a usable row."""
    parser = Parser(__doc__)
    tiny = Path(__file__).parent.parent / "tiny"
    parser.add_argument("data", help="JSONL file or hub id of the migration examples")
    add = parser.add_argument_group("what it is meant for").add_argument
    text = "whose tokenizer counts: run directory, checkpoint directory or hub id [tiny, a toy]"
    add("--model", default=os.path.relpath(tiny), metavar="X", help=text)
    add("--max-prompt-tokens", type=int, metavar="X", help="as in training [the checkpoint's, or 2048]")
    add("--max-new-tokens", type=int, metavar="X", help="as in training [the checkpoint's, or 1024]")
    args = parser.parse_args(argv)
    base, _, settings = loading.open_policy(args.model)
    prompt = args.max_prompt_tokens or settings.get("max_prompt_tokens", 2048)
    new = args.max_new_tokens or settings.get("max_new_tokens", 1024)
    check(args.data, loading.load_tokenizer(base), prompt, new)
    if args.model == parser.get_default("model"):
        print("\nnote      tokens are those of the toy, about one a character; --model takes yours")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
