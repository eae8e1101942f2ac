"""What a run prints: a row per step, a sample now and then, the table of the held-out tasks."""

import math
import os
import sys
import textwrap
import time

from tqdm import tqdm

from lib import parallel

COLUMNS = (  # metric, heading, width and format of a step's row on the screen
    ("step", "step", 5, ".0f"), ("reward", "reward", 7, ".3f"), ("reward_std", "std", 6, ".3f"),
    ("format", "format", 7, ".2f"), ("es", "ES", 6, ".3f"), ("em", "exact", 6, ".2f"),
    ("stale", "stale", 6, ".2f"), ("obeys", "obeys", 6, ".2f"),
    ("loss", "loss", 8, ".4f"), ("kl", "kl", 8, ".5f"),
    ("clip_fraction", "clip", 6, ".3f"), ("grad_norm", "grad", 6, ".2f"), ("lr", "lr", 9, ".1e"),
    ("completion_length", "tokens", 7, ".1f"), ("tokens_per_second", "tok/s", 6, ".0f"),
)  # fmt: skip


def style(text, code):
    """`text` in an ANSI style ("1" bold, "2" dim); plain without a terminal or with NO_COLOR."""
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if dumb or not sys.stdout.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


def progress(batches, what, hidden=False, passed=()):
    """Yield lists of items; a bar shows how many are done, and how many of `passed` are true.

    Without a terminal: a line now, and at most one every half minute.
    """
    total = sum(map(len, batches))
    done = 0
    began = shown = time.monotonic()
    with tqdm(total=total, desc=what, leave=False, disable=hidden or None) as bar:
        lines = bar.disable and not hidden
        if lines:
            print(f"{what}: 0 of {total:,}", flush=True)
        for batch in batches:
            yield batch
            done += len(batch)
            right = f"{sum(passed)} of {len(passed)} right" if passed else ""
            bar.set_postfix_str(right, refresh=False)
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
    return "\n".join(style(f"    | {line}", "2") for line in lines)


class Screen:
    """The steps of a run above a progress bar, which --quiet hides."""

    def __init__(self, config, step):
        self.config = config
        self.first = True  # no step of this process has been shown yet
        hidden = config.quiet or parallel.RANK > 0
        bar = {"total": config.steps, "initial": step, "unit": "step", "leave": False}
        self.bar = tqdm(**bar, disable=hidden or None)  # None: hidden without a terminal

    def show_step(self, row):
        """A row of metrics; before the first one an estimate and the headings."""
        heads = cells = ""
        for name, heading, width, form in COLUMNS:
            if name in row or "reward" in row:  # sft.py samples nothing
                value = row.get(name)  # None where nothing finite is known
                heads += f"{heading:>{width}}"
                cells += f"{math.nan if value is None else value:{width}{form}}"
        if self.first:
            seconds = row["seconds_sample"] + row["seconds_update"]
            left = (self.config.steps - row["step"]) * seconds
            tqdm.write(f"estimate  {left:,.0f} seconds for the other steps, from the first one\n")
            tqdm.write(style(heads, "1"))
            self.first = False
        tqdm.write(cells)
        self.bar.update()

    def show_sample(self, step, group):
        """The first completion of a group: its reward, the update note, the answer."""
        note = " ".join(group.example.update_info.split())
        text = f"sample of step {step}, reward {group.rewards[0]:.2f}\nnote: {note}\n"
        tqdm.write(f"\n{excerpt(f'{text}<think>{group.texts[0]}', 20)}\n")


def heldout_table(before, after):
    """The held-out metrics side by side, as text; obeys only where a note names something."""
    names = {"em": "exact match", "stale": "stale rate", "obeys": "obeys", "format": "format"}
    names |= {"es": "ES", "reward": "sampled reward"}
    rows = [f"  {'held-out tasks':<16}{'before':>9}{'after':>9}{'change':>9}"]
    for key, name in names.items():
        if before.get(key) is None or after.get(key) is None:  # an older run lacks obeys
            continue
        change = after[key] - before[key]
        rows.append(f"  {name:<16}{before[key]:9.3f}{after[key]:9.3f}{change:+9.3f}")
    return "\n".join(rows)
