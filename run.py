"""The run directory: everything a run leaves behind, complete and readable while it goes on.

    config.json      every setting                     curve.svg    reward, exact match, stale rate
    metrics.jsonl    one row of figures a step         adapter/     the trained part, as PEFT saves it
    samples.jsonl    prompts, completions, rewards     model/       or the whole of it, at the end
    heldout.json     held-out figures, at the end      checkpoint/  all that --resume needs

A file is either appended to line by line or replaced whole: written aside, synced, renamed. So a run
that is killed at any moment, also while it saves, or that meets a full disk, keeps its last
checkpoint; --resume cuts the logs back to it and goes on as if nothing had happened.
"""

import contextlib
import json
import math
import os
import pickle
import re
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from data import BadInput

MAY_CHANGE = ("resume", "output", "steps", "save_every", "show_every", "offload", "micro_tokens", "keep_activations")  # between a run and its --resume
LOGS = ("metrics.jsonl", "samples.jsonl")


def write(path, content):
    """Write bytes so that `path` holds either all of them or what it held before, whatever happens.

    `content` may also be a function that writes to an open file. Only rank 0 writes.
    """
    if parallel.RANK > 0:
        return
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's word for a full disk
        with contextlib.suppress(OSError):
            aside.unlink()
        why = getattr(error, "strerror", None) or "torch.save failed, as it does on a full disk"
        raise BadInput(f"cannot write {path}: {why}; nothing that was there is harmed")


def read_settings(path):
    """The JSON object in a file, as a dict."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read as a JSON object ({error})")


# figure, heading, format of a step's row on the screen
COLUMNS = (
    ("step", "step", "5d"), ("reward", "reward", "7.3f"), ("reward_std", "std", "6.3f"), ("format", "format", "7.2f"),
    ("es", "ES", "6.3f"), ("em", "exact", "6.2f"), ("stale", "stale", "6.2f"), ("loss", "loss", "8.4f"),
    ("kl", "kl", "8.5f"), ("clip_fraction", "clip", "6.3f"), ("grad_norm", "grad", "6.2f"), ("lr", "lr", "9.1e"),
    ("completion_length", "tokens", "7.1f"), ("tokens_per_second", "tok/s", "6.0f"),
)  # fmt: skip


class Stop:
    """Ctrl-C or SIGTERM asks for a stop after the running step; a second one stops at once."""

    asked = 0.0

    def __call__(self, number, frame):
        if self.asked and (parallel.WORLD == 1 or time.monotonic() > self.asked + 2):  # torchrun repeats a Ctrl-C
            raise KeyboardInterrupt
        self.asked = time.monotonic()
        tqdm.write("stopping after this step; once more to stop at once")


def show(step, group):
    """A sample completion for the screen: the update note, what the model made of it, the reward."""
    lines = [
        f"sample of step {step}, reward {group.rewards[0]:.2f}",
        f"note: {group.example.update_info}",
        *f"<think>{group.texts[0]}".split("\n"),
    ]
    return "\n" + "\n".join(f"    | {line[:92]}" for line in lines[:20]) + "\n"


LEFT, RIGHT, TOP, BOTTOM = 60, 700, 40, 370  # of the plot, in an SVG of 760 x 420
SERIES = (("reward", -3, 3, "#1f5fbf"), ("em", 0, 1, "#2a8a3e"), ("stale", 0, 1, "#c2452d"))  # figure, axis, colour


def text(x, y, content, more=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{content}</text>'


def svg(height, parts):
    """A picture, 760 wide, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="760" height="{height}" fill="white"/>', *parts, "</svg>"])


def frame(first, last):
    """Axes and grid: reward on the left, shares on the right, steps `first` to `last` below."""
    parts = []
    for tick in range(-3, 4):
        y = BOTTOM - (BOTTOM - TOP) * (tick + 3) / 6
        parts.append(f'<path d="M{LEFT} {y:.0f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, tick, 'text-anchor="end"'))
    for tick in range(0, 101, 25):
        parts.append(text(RIGHT + 8, BOTTOM - (BOTTOM - TOP) * tick / 100 + 4, f"{tick}%"))
    for fifth in range(6):
        x = LEFT + (RIGHT - LEFT) * fifth / 5
        parts.append(text(x, BOTTOM + 20, first + (last - first) * fifth // 5, 'text-anchor="middle"'))
    return [*parts, text((LEFT + RIGHT) / 2, BOTTOM + 40, "step", 'text-anchor="middle"')]


def curve(rows):
    """An SVG picture of metrics rows: thin lines are the steps, thick ones the mean of nine around each."""
    steps = [row["step"] for row in rows] or [0]
    parts = frame(steps[0], steps[-1])
    for place, (name, low, high, colour) in enumerate(SERIES):
        known = [row for row in rows if row[name] is not None]
        values = [row[name] for row in known]
        near = [values[max(0, i - 4) : i + 5] for i in range(len(values))]
        for line, style in ((values, 'opacity="0.3"'), ([sum(n) / len(n) for n in near], 'stroke-width="2.5"')):
            points = []
            for row, value in zip(known, line):
                x = LEFT + (RIGHT - LEFT) * (row["step"] - steps[0]) / max(1, steps[-1] - steps[0])
                points.append(f"{x:.1f},{BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low):.1f}")
            parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" {style}/>')
        label = {"reward": "reward (left)", "em": "exact match", "stale": "stale"}[name]
        parts.append(text(LEFT + 20 + 150 * place, TOP - 15, label, f'fill="{colour}" font-weight="bold"'))
    return svg(420, parts)


class Run:
    """The run directory: config.json, metrics.jsonl, samples.jsonl, curve.svg, checkpoint/, adapter/."""

    def __init__(self, config):
        """Claim config.output for a new run, or check that it holds the run to go on with."""
        self.config, self.path, self.rows = config, Path(config.output), []
        self.estimate = True  # the first step of this process tells how long all will take
        self.checkpoint = self.path / "checkpoint" / "state.pt"
        settings = asdict(config)
        if config.resume and not self.checkpoint.is_file():
            raise BadInput(f"--resume: no checkpoint in {self.path}; start without --resume")
        if config.resume:
            before = read_settings(self.path / "config.json")
            for name in settings:
                if name not in MAY_CHANGE and before.get(name) != settings[name]:
                    raise BadInput(f"--resume: {name} was {before.get(name)!r} in {self.path}, now {settings[name]!r}")
        elif not config.dry_run and (self.path.is_dir() and any(self.path.iterdir()) or self.path.is_file()):
            raise BadInput(f"--output {self.path} is not empty; --resume goes on with it, another --output starts anew")

    def begin(self):
        """Make the directory, once everything else has proved sound, on all ranks."""
        parallel.together(False)
        if parallel.RANK > 0:
            return
        write(self.path / "config.json", json.dumps(asdict(self.config), indent=2).encode())
        for name in LOGS:
            (self.path / name).touch()

    @contextlib.contextmanager
    def progress(self, done):
        """Around the training loop: the progress bar, and the Stop that Ctrl-C sets."""
        stop = Stop()
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            hidden = parallel.RANK > 0 or None
            with tqdm(total=self.config.steps, initial=done, unit="step", disable=hidden, leave=False) as self.bar:
                yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def append(self, name, row):
        """One JSON object more in a .jsonl file. What is not finite becomes null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with open(self.path / name, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise BadInput(f"cannot write {self.path / name}: {error.strerror}; make room, then --resume")
        return row

    def log(self, figures, groups):
        """A step's row for the file and the screen; now and then its first group of samples and the curve."""
        if parallel.RANK > 0:
            return
        seconds = sum(value for name, value in figures.items() if name.startswith("seconds"))
        tokens = sum(len(ids) for group in groups for ids in group.completions)
        row = self.append("metrics.jsonl", {**figures, "tokens_per_second": tokens / seconds})
        self.rows.append(row)
        if self.estimate:
            self.estimate, left = False, (self.config.steps - row["step"]) * seconds
            tqdm.write(f"estimate  {left:,.0f} seconds for the steps to come, by the first of them\n")
            tqdm.write("".join(f"{title:>{int(re.match('[0-9]+', form)[0])}}" for _, title, form in COLUMNS))
        tqdm.write("".join(f"{math.nan if row[name] is None else row[name]:{form}}" for name, _, form in COLUMNS))
        self.bar.update()
        if row["step"] % self.config.show_every == 0 or row["step"] in (1, self.config.steps):
            for text, reward in zip(groups[0].texts, groups[0].rewards):
                sample = {"update_info": groups[0].example.update_info, "completion": text, "reward": reward}
                self.append("samples.jsonl", {"step": row["step"], **sample})
            tqdm.write(show(row["step"], groups[0]))
            write(self.path / "curve.svg", curve(self.rows).encode())

    def save(self, trained, state):
        """A checkpoint in one file, replaced in one step: what parallel.full_state() gave, `state`, log lengths."""
        if parallel.RANK > 0:
            return
        files = {name: (self.path / name).stat().st_size for name in LOGS}
        write(self.checkpoint, lambda file: torch.save({**trained, "state": state, "files": files}, file))
        write(self.path / "curve.svg", curve(self.rows).encode())

    def load(self, model, optimizer):
        """Put the last checkpoint into model and optimizer, cut later rows off the logs; its `state`."""
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            raise BadInput(f"--resume: {self.checkpoint} is damaged; start anew with another --output")
        parallel.load_state(model, optimizer, saved)
        if parallel.RANK > 0:
            return saved["state"]
        for name, size in saved["files"].items():
            os.truncate(self.path / name, size)
        self.rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return saved["state"]
