"""What a run prints: a row per step, a sample now and then, the table of the held-out tasks."""

import math
import textwrap
import time

from tqdm import tqdm

COLUMNS = (  # metric, heading, width and format of a step's row on the screen
    ("step", "step", 5, ".0f"), ("reward", "reward", 7, ".3f"), ("reward_std", "std", 6, ".3f"),
    ("format", "format", 7, ".2f"), ("es", "ES", 6, ".3f"), ("em", "exact", 6, ".2f"),
    ("stale", "stale", 6, ".2f"), ("obeys", "obeys", 6, ".2f"),
    ("loss", "loss", 8, ".4f"), ("kl", "kl", 8, ".5f"),
    ("clip_fraction", "clip", 6, ".3f"), ("grad_norm", "grad", 6, ".2f"), ("lr", "lr", 9, ".1e"),
    ("completion_length", "tokens", 7, ".1f"), ("tokens_per_second", "tok/s", 6, ".0f"),
)  # fmt: skip


def progress(batches, what, hidden=False, passed=()):
    """Yield lists of items; a bar shows how many are done, and how many of `passed` are true."""
    total = sum(map(len, batches))
    done = 0
    began = shown = time.monotonic()
    with tqdm(total=total, desc=what, leave=False, disable=hidden or None) as bar:
        lines = bar.disable and not hidden  # without a terminal: now and every half minute
        if lines:
            print(f"{what}: 0 of {total:,}", flush=True)
        for batch in batches:
            yield batch
            done += len(batch)
            if passed:
                bar.set_postfix_str(f"{sum(passed)} of {len(passed)} right", refresh=False)
            bar.update(len(batch))
            now = time.monotonic()
            if lines and done and now >= shown + 30:
                left = tqdm.format_interval((now - began) / done * (total - done))
                print(f"{what}: {done:,} of {total:,}, {left} left", flush=True)
                shown = now


def excerpt(text, most):
    """At most `most` lines of `text` for the screen, without control characters."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        clean = "".join(char if char.isprintable() else "?" for char in line)
        lines += textwrap.wrap(clean, 94, drop_whitespace=False) if clean else [""]
    if len(lines) > most:
        lines[most - 1 :] = [f"... and {len(lines) - most + 1} lines more"]
    return "\n".join(f"    | {line}" for line in lines)


def show_step(row, headings):
    """Print a row of metrics, below the headings if asked for; above a bar, if there is one."""
    heads = cells = ""
    for name, heading, width, form in COLUMNS:
        if name in row or "reward" in row:  # sft.py samples nothing
            value = row.get(name)  # None where nothing finite is known
            heads += f"{heading:>{width}}"
            cells += f"{math.nan if value is None else value:{width}{form}}"
    if headings:
        tqdm.write(f"\n{heads}")
    tqdm.write(cells)


def show_sample(step, group):
    """Print the first completion of a group: its reward, the update note, the answer."""
    note = " ".join(group.example.update_info.split())
    text = f"sample of step {step}, reward {group.rewards[0]:.2f}\nnote: {note}\n"
    tqdm.write(f"\n{excerpt(f'{text}<think>{group.texts[0]}', 20)}\n")


HELDOUT = {  # metric: row of the table
    "em": "exact match", "stale": "stale rate", "obeys": "obeys", "format": "format",
    "es": "ES", "reward": "sampled reward",
}  # fmt: skip


def heldout_table(before, after):
    """The held-out metrics side by side, as text; obeys only where a note names something."""
    rows = [f"  {'held-out tasks':<16}{'before':>9}{'after':>9}{'change':>9}"]
    for key, name in HELDOUT.items():
        if before.get(key) is not None and after.get(key) is not None:  # an older run lacks obeys
            change = after[key] - before[key]
            rows.append(f"  {name:<16}{before[key]:9.3f}{after[key]:9.3f}{change:+9.3f}")
    return "\n".join(rows)
