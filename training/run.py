"""The run directory: what a run leaves, and what --resume needs.

    config.json      every setting                     page.html    all of these to look at
    metrics.jsonl    one row per step                  adapter/     what was trained, in PEFT's form
    samples.jsonl    notes, completions, rewards       model/       or the full model, at the end
    heldout.json     held-out metrics, at the end      checkpoint/  all that --resume needs
    tensorboard/, wandb/    the metrics for another program, with --log-to

A file is either appended to line by line or replaced atomically. So a run that is killed at any
moment, or that meets a full disk, keeps its last checkpoint; --resume truncates the logs to it and
continues as if nothing had happened.
"""

import contextlib
import importlib.util
import json
import math
import os
import pickle
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

import dora
from lib import parallel
from lib.config import BadInput, read_run
from lib.files import lock, write
from lib.loading import write_model
from training import screen
from training.measure import measure_heldout, token_logps
from training.page import page, read_rows
from training.tracker import open_tracker

MAX_NONFINITE = 3  # steps in a row with an update that is not finite, before a run gives up
MAY_CHANGE = (  # between a run and its --resume
    "resume", "output", "steps", "save_every", "show_every", "log_to", "quiet",
    "micro_tokens", "keep_activations", "dry_run",
)  # fmt: skip
LOGS = ("metrics.jsonl", "samples.jsonl")
GRADED = ("format", "parses", "es", "em", "stale", "obeys")  # of a Grade, in samples.jsonl


class Stop:
    """Ctrl-C or SIGTERM asks for a stop after the current step; a second one stops at once."""

    asked = 0.0

    def __call__(self, number, frame):
        again = parallel.WORLD == 1 or time.monotonic() > self.asked + 2  # torchrun repeats Ctrl-C
        if self.asked and again:
            raise KeyboardInterrupt
        self.asked = time.monotonic()
        tqdm.write("stopping after this step; once more to stop at once")


def learning_rate(step, config):
    """The learning rate of step 0, 1, ...: linear warm-up, then half a cosine down to 0."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warm) / (config.steps - warm))) / 2


def check_output(config):
    """Raise BadInput unless --output is free for a new run, or holds the one to resume."""
    path = Path(config.output)
    name = config.log_to
    if name and not importlib.util.find_spec(name):
        raise BadInput(f"--log-to {name}: it is not installed; pip install {name}")
    if not config.resume:
        used = os.path.isfile(path) or os.path.isdir(path) and set(os.listdir(path)) - {"lock"}
        if used and not config.dry_run:
            way_out = "--resume continues it, another --output starts a new run"
            raise BadInput(f"--output {path} is not empty; {way_out}")
        return
    if not (path / "config.json").is_file():
        raise BadInput(f"--resume: no checkpoint in {path}; start without --resume")
    before = read_run(path)
    for name, now in vars(config).items():
        was = before.get(name, now)  # an older run lacks a new setting
        same = was == now or os.path.realpath(str(was)) == os.path.realpath(str(now))
        if name not in MAY_CHANGE and not same:
            raise BadInput(f"--resume: {name} was {was!r} in {path}, now {now!r}")
        if name == "steps" and was != now:
            text = "the learning rate goes on along the cosine of the new number"
            print(f"warning   --steps was {was:,}, now {now:,}: {text}")


def append(path, rows, way_out):
    """Append rows to a .jsonl file, None for what is not finite; BadInput ends with `way_out`."""
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None
    try:
        with open(path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; free some space, then {way_out}")


class RunDirectory:
    """Claims --output, logs the steps, saves checkpoints, and finishes the run."""

    def __init__(self, config, model, tokenizer):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.path = Path(config.output)
        self.checkpoint = self.path / "checkpoint" / "state.pt"
        self.before = {}  # held-out metrics before training
        self.page_due = 0.0  # when page.html may be written again
        self.lock = self.bar = self.tracker = None  # until begin() and loop()
        self.headings = True  # stand above the next row on the screen
        self.group = self.logps = None  # what page.html shows of this step, before the update

    def begin(self, optimizer, heldout):
        """(step, position, nonfinite) to start with: from the checkpoint, or of a new run."""
        parallel.barrier()  # all ranks have passed their checks
        if parallel.RANK == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"cannot write {self.path}: {error.strerror}; give another --output")
            self.lock = lock(self.path)
            settings = vars(self.config) | {"began_in": os.path.relpath(".", self.path.resolve())}
            write(self.path / "config.json", json.dumps(settings, indent=2).encode())
        if self.config.resume and self.checkpoint.is_file():  # else stopped before its first one
            return self.load(optimizer)
        if parallel.RANK == 0:
            for name in LOGS:
                (self.path / name).write_bytes(b"")
        if heldout:
            self.before = measure_heldout(self.model, self.tokenizer, heldout, self.config)
        self.save(optimizer, 0, 0, 0)  # from here on there is something to resume
        return 0, 0, 0

    @contextlib.contextmanager
    def loop(self, step):
        """Around the training loop: the bar, the tracker, and the Stop that Ctrl-C sets."""
        if self.config.log_to and parallel.RANK == 0:
            self.tracker = open_tracker(self.config, step + 1)
        hidden = self.config.quiet or parallel.RANK > 0
        settings = {"total": self.config.steps, "initial": step, "unit": "step", "leave": False}
        self.bar = tqdm(**settings, disable=hidden or None)  # None: hidden without a terminal
        stop = Stop()
        handlers = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stop
        finally:
            self.bar.close()
            if self.tracker:
                self.tracker.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def watch(self, step, groups):
        """Before the update: choose the group of which page.html shows what the update does."""
        due = step % self.config.show_every == 0 or step in (1, self.config.steps)
        self.group = None
        if due and groups[0].texts:  # sft.py samples nothing; equal answers teach nothing
            self.group = next((group for group in groups if any(group.advantages)), groups[0])
            self.logps = token_logps(self.model, self.group, self.config)

    def log(self, step, metrics, groups):
        """Log a step to the files and the screen; the group that is watched, too."""
        # On all ranks, as a pass through sharded weights needs them all.
        after = token_logps(self.model, self.group, self.config) if self.group else []
        if parallel.RANK > 0:
            return
        seconds = metrics["seconds_sample"] + metrics["seconds_update"]
        count = sum(len(ids) for group in groups for ids in group.completions)
        row = {"step": step, **metrics, "tokens_per_second": count / seconds}
        append(self.path / "metrics.jsonl", [row], "--resume")
        if self.tracker:
            self.tracker.log(row)
        if self.group:
            self.append_samples(step, self.group, after)
            self.write_page()
        if not self.config.quiet:
            screen.show_step(row, self.headings)
            self.bar.update()
            self.headings = False
            if self.group:
                screen.show_sample(step, self.group)

    def append_samples(self, step, group, after):
        """Append a group to samples.jsonl; after: log-probabilities after the update."""
        example = group.example
        rows = []
        for i, grade in enumerate(group.grades):
            row = {"step": step, "update_info": example.update_info}
            row |= {"completion": group.texts[i], "reward": group.rewards[i]}
            row |= {name: getattr(grade, name) for name in GRADED} | {"cut": group.cut[i]}
            row |= {"old_code": example.old_code, "new_code": example.new_code}
            row["advantage"] = group.advantages[i] if group.advantages else 0.0  # DAPO drops some
            texts = self.tokenizer.batch_decode([[token] for token in group.completions[i]])
            row["tokens"] = list(zip(texts, self.logps[i], after[i], strict=True))
            rows.append(row)
        append(self.path / "samples.jsonl", rows, "--resume")

    def write_page(self, last=False):
        """Write page.html, but so seldom that it takes at most 1 % of the run's time."""
        start = time.perf_counter()
        if last or start > self.page_due:
            write(self.path / "page.html", page([self.path]))
            end = time.perf_counter()
            self.page_due = end + 100 * (end - start)

    def save(self, optimizer, step, position, nonfinite):
        """Replace the checkpoint atomically, and save the adapter as it is now."""
        saved = parallel.full_state(self.model, optimizer)
        if parallel.RANK == 0:
            state = {"step": step, "position": position, "nonfinite": nonfinite}
            saved["state"] = state | {"before": self.before}
            saved["files"] = {name: (self.path / name).stat().st_size for name in LOGS}
            write(self.checkpoint, lambda file: torch.save(saved, file))
        if self.config.adapter != "none":
            dora.save_adapter(self.model, self.config, self.path / "adapter")

    def load(self, optimizer):
        """Load the checkpoint, truncate the logs to it; its (step, position, nonfinite)."""
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            raise BadInput(f"--resume: {self.checkpoint} is damaged; give another --output")
        parallel.load_state(self.model, optimizer, saved)
        if parallel.RANK == 0:
            for name, size in saved["files"].items():
                path = self.path / name
                if not path.is_file() or path.stat().st_size < size:
                    raise BadInput(f"--resume: {path} has lost rows; restore it, or start again")
                os.truncate(path, size)
        state = saved["state"]
        self.before = state["before"]
        return state["step"], state["position"], state["nonfinite"]

    def finish(self, optimizer, heldout, step, position, nonfinite):
        """After the loop: save, measure, print what came of the run. Returns the exit status."""
        status = 0 if step == self.config.steps else 130
        if nonfinite == MAX_NONFINITE:
            print(f"stopped: loss or gradient not finite {nonfinite} times in a row, step {step}")
            print(f"{self.path} keeps the last good checkpoint; lower --lr and start again")
            status = 1
        else:
            self.save(optimizer, step, position, nonfinite)
            if self.config.adapter == "none":
                write_model(self.model, self.tokenizer, self.path / "model")
        if status == 130:
            print(f"stopped after step {step}, all saved in {self.path}")
            print("the same command with --resume continues")
        if status == 0:
            self.conclude(heldout)
        if parallel.RANK == 0:
            self.write_page(last=True)
            self.lock.close()
        return status

    def conclude(self, heldout):
        """Measure the held-out tasks again, and print what the run leaves."""
        if heldout:
            after = measure_heldout(self.model, self.tokenizer, heldout, self.config)
            metrics = {"before": self.before, "after": after}
            if parallel.RANK == 0:
                write(self.path / "heldout.json", json.dumps(metrics, indent=2).encode())
            print(screen.heldout_table(**metrics))
        rows = read_rows(self.path / "metrics.jsonl")
        if all(row.get("no_spread") == 1 for row in rows):  # not of sft.py
            text = "no group's rewards differed; raise --max-new-tokens or --temperature"
            print(f"warning   nothing was learned: {text}")
        print(f"done: {self.path}/ holds all that the run leaves; page.html shows it")
