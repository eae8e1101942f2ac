"""Everything around the training loop: the run directory, its logs and checkpoints, --resume.

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
import dataclasses
import importlib
import json
import math
import os
import pickle
import secrets
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import dora
import rollout
from lib import parallel
from lib.config import BadInput, read_run
from lib.files import lock, write
from lib.loading import write_model
from training import screen
from training.page import page, read_rows
from training.watch import Watch

MAX_NONFINITE = 3  # steps in a row with an update that is not finite, before a run gives up
HELDOUT_SAMPLES = 6  # held-out answers that go to samples.jsonl, before and after
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


def measure_heldout(model, tokenizer, tasks, config):
    """(metrics, groups) of held-out `tasks`: greedy answers, but the reward is of sampled ones.

    Seed 0, so that runs with different seeds are measured on the same random numbers.
    """
    one = SimpleNamespace(**vars(config) | {"num_samples": 1, "seed": 0})
    best = SimpleNamespace(**vars(one) | {"temperature": 0.0})
    size = max(8, config.prompts_per_step * config.num_samples)
    hidden = config.quiet or parallel.RANK > 0
    greedy = []
    sampled = []
    batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    for batch in screen.progress(batches, "held-out tasks", hidden):
        start = len(greedy)
        greedy += rollout.sample_groups(model, tokenizer, batch, best, start)
        sampled += rollout.sample_groups(model, tokenizer, batch, one, start)
    return rollout.summarize(greedy) | {"reward": rollout.summarize(sampled)["reward"]}, greedy


def learning_rate(step, config):
    """The learning rate of step 0, 1, ...: linear warm-up, then half a cosine down to 0."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warm) / (config.steps - warm))) / 2


def append(path, rows, way_out):
    """Append JSON objects to a .jsonl file. Raises BadInput, which ends with the `way_out`."""
    try:
        with open(path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; free some space, then {way_out}")


# ------------------------------------------------------------------------- --log-to


def import_tracker(name):
    """The module behind --log-to; BadInput if it cannot be imported."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise BadInput(f"--log-to {name}: it is not installed; pip install {name}")


def open_tracker(config, step):
    """What sends the metrics to the program of --log-to, or None: an object with log(row), close().

    A resumed run logs some steps again, from `step` on.
    """
    if not config.log_to or parallel.RANK > 0:
        return None
    module = import_tracker(config.log_to)
    path = Path(config.output)
    if config.log_to == "tensorboard":
        writer = module.SummaryWriter(path / "tensorboard", purge_step=step)  # drops later rows

        def log(row):
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name, value, row["step"])
            writer.flush()

        return SimpleNamespace(log=log, close=writer.close)

    name = path / "wandb" / "id"  # on wandb's server
    if not name.is_file():
        write(name, secrets.token_hex(4).encode())
    settings = {"project": "recode", "dir": path, "config": dataclasses.asdict(config)}
    settings |= {"id": name.read_text(), "resume": "allow", "allow_val_change": True}
    try:
        server = module.init(**settings)
    except module.Error as error:
        why = " ".join(str(error).split())
        raise BadInput(f"--log-to wandb: {why}; or set WANDB_MODE=offline")

    def log(row):
        if row["step"] >= server.step:  # wandb keeps the first row of a step
            server.log(row, step=row["step"])

    return SimpleNamespace(log=log, close=server.finish)


# ------------------------------------------------------------------------- the run directory


def check_resume(config):
    """Raise BadInput unless --output holds a run of the same settings."""
    path = Path(config.output)
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


class RunDirectory:
    """Claims --output, logs the steps, saves checkpoints, and finishes the run."""

    def __init__(self, config):
        """Check that config.output is free for a new run, or holds the run to resume."""
        self.config = config
        self.path = Path(config.output)
        self.checkpoint = self.path / "checkpoint" / "state.pt"
        self.before = {}  # held-out metrics before training
        self.page_due = 0.0  # when page.html may be written again
        self.watched = self.tracker = self.screen = None  # until begin()
        if config.log_to:
            import_tracker(config.log_to)  # fail now, not after the first measurement
        if config.resume:
            check_resume(config)
        elif not config.dry_run:
            used = os.path.isdir(self.path) and set(os.listdir(self.path)) - {"lock"}
            if used or os.path.isfile(self.path):
                way_out = "--resume continues it, another --output starts a new run"
                raise BadInput(f"--output {self.path} is not empty; {way_out}")

    def create(self):
        """Make the directory and lock it, after all ranks have passed their checks."""
        parallel.barrier()
        if parallel.RANK > 0:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write {self.path}: {error.strerror}; give another --output")
        self.lock = lock(self.path)
        began = os.path.relpath(".", self.path.resolve())
        settings = dataclasses.asdict(self.config) | {"began_in": began}
        write(self.path / "config.json", json.dumps(settings, indent=2).encode())

    def begin(self, model, tokenizer, optimizer, heldout):
        """(step, position, nonfinite) to start with: from the checkpoint, or of a new run.

        A run that was stopped before its first checkpoint has nothing to resume: it starts again.
        """
        self.watched = Watch(model, tokenizer, self.config)
        if self.config.resume and self.checkpoint.is_file():
            return self.load(model, optimizer)
        if parallel.RANK == 0:
            for name in LOGS:
                (self.path / name).write_bytes(b"")
        if heldout:
            self.before = self.measure(0, model, tokenizer, heldout)
        self.save(model, optimizer, 0, 0, 0)  # from here on there is something to resume
        return 0, 0, 0

    def measure(self, step, model, tokenizer, heldout):
        """The held-out metrics now; the first answers go to samples.jsonl."""
        metrics, groups = measure_heldout(model, tokenizer, heldout, self.config)
        for group in groups[:HELDOUT_SAMPLES]:
            self.append_samples(step, group, heldout=True)
        return metrics

    @contextlib.contextmanager
    def loop(self, step):
        """Around the training loop: the screen, the tracker, and the Stop that Ctrl-C sets."""
        self.tracker = open_tracker(self.config, step + 1)
        self.screen = screen.Screen(self.config, step)
        stop = Stop()
        handlers = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stop
        finally:
            self.screen.bar.close()
            if self.tracker:
                self.tracker.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def append(self, name, row):
        """Append a JSON object to a .jsonl file; its values that are not finite become None."""
        if parallel.RANK > 0:
            return
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None
        append(self.path / name, [row], "--resume")

    def append_samples(self, step, group, tokens=(), **more):
        """Append the completions of a group to samples.jsonl; tokens: of Watch.after()."""
        for i, grade in enumerate(group.grades):
            sample = {"step": step, **more, "update_info": group.example.update_info}
            sample |= {"completion": group.texts[i], "reward": group.rewards[i]}
            sample |= {name: getattr(grade, name) for name in GRADED} | {"cut": group.cut[i]}
            sample |= {name: getattr(group.example, name) for name in ("old_code", "new_code")}
            if tokens:  # DAPO may have dropped the group
                sample["advantage"] = group.advantages[i] if group.advantages else 0.0
                sample["tokens"] = tokens[i]
            self.append("samples.jsonl", sample)

    def watch(self, step, groups):
        """Before the update: page.html shows what it does to one of the groups."""
        self.watched.group = None
        if step % self.config.show_every == 0 or step in (1, self.config.steps):
            self.watched.before(groups)

    def log(self, step, metrics, groups):
        """Log a step to the files and the screen; the group that is watched, too."""
        tokens = self.watched.after() if self.watched.group else ()
        if parallel.RANK > 0:
            return
        seconds = metrics["seconds_sample"] + metrics["seconds_update"]
        count = sum(len(ids) for group in groups for ids in group.completions)
        row = {"step": step, **metrics, "tokens_per_second": count / seconds}
        self.append("metrics.jsonl", row)
        if self.tracker:
            self.tracker.log(row)
        if not self.config.quiet:
            self.screen.show_step(row)
        if tokens:
            self.append_samples(step, self.watched.group, tokens)
            if not self.config.quiet:
                self.screen.show_sample(step, self.watched.group)
            self.write_page()

    def write_page(self, last=False):
        """Write page.html, but so seldom that it takes at most 1 % of the run's time."""
        start = time.perf_counter()
        if last or start > self.page_due:
            write(self.path / "page.html", page([self.path]))
            end = time.perf_counter()
            self.page_due = end + 100 * (end - start)

    def save(self, model, optimizer, step, position, nonfinite):
        """Replace the checkpoint atomically, and save the adapter as it is now."""
        saved = parallel.full_state(model, optimizer)
        if parallel.RANK == 0:
            state = {"step": step, "position": position, "nonfinite": nonfinite}
            saved["state"] = state | {"before": self.before}
            saved["files"] = {name: (self.path / name).stat().st_size for name in LOGS}
            write(self.checkpoint, lambda file: torch.save(saved, file))
        if self.config.adapter != "none":
            dora.save_adapter(model, self.config, self.path / "adapter")

    def load(self, model, optimizer):
        """Load the checkpoint, truncate the logs to it; its (step, position, nonfinite)."""
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            raise BadInput(f"--resume: {self.checkpoint} is damaged; give another --output")
        parallel.load_state(model, optimizer, saved)
        if parallel.RANK == 0:
            for name, size in saved["files"].items():
                path = self.path / name
                if not path.is_file() or path.stat().st_size < size:
                    raise BadInput(f"--resume: {path} has lost rows; restore it, or start again")
            for name, size in saved["files"].items():
                os.truncate(self.path / name, size)
        state = saved["state"]
        self.before = state["before"]
        return state["step"], state["position"], state["nonfinite"]

    def finish(self, model, tokenizer, optimizer, heldout, step, position, nonfinite):
        """After the loop: save, measure, print what came of the run. Returns the exit status."""
        if nonfinite == MAX_NONFINITE:
            print(f"stopped: loss or gradient not finite {nonfinite} times in a row, step {step}")
            print(f"{self.path} keeps the last good checkpoint; lower --lr and start again")
            status = 1
        else:
            self.save(model, optimizer, step, position, nonfinite)
            if self.config.adapter == "none":
                what = f"{self.config.model} trained by {' '.join(sys.argv)}."
                write_model(model, tokenizer, self.path / "model", what)
            if step < self.config.steps:
                print(f"stopped after step {step}, all saved in {self.path}; to continue:")
                print(f"  {resume_command(self.config)}")
                status = 130
            else:
                self.conclude(model, tokenizer, heldout)
                status = 0
        if parallel.RANK == 0:
            self.write_page(last=True)
            self.lock.close()
        return status

    def conclude(self, model, tokenizer, heldout):
        """Measure the held-out tasks again, and print what the run leaves."""
        if heldout:
            after = self.measure(self.config.steps, model, tokenizer, heldout)
            metrics = {"before": self.before, "after": after}
            if parallel.RANK == 0:
                write(self.path / "heldout.json", json.dumps(metrics, indent=2).encode())
            print(screen.heldout_table(**metrics))
        if reason := nothing_learned(list(read_rows(self.path / "metrics.jsonl"))):
            print(f"warning   nothing was learned: {reason}")
        kept = "model" if self.config.adapter == "none" else "adapter"
        files = "metrics.jsonl, samples.jsonl, page.html, checkpoint/"
        print(f"done: {self.path}/ holds {files} and {kept}/")


def nothing_learned(rows):
    """Why a run taught the model nothing, or ""."""
    rewards = [row["no_spread"] for row in rows if "no_spread" in row]
    if rewards and min(rewards) == 1:
        if max(row["es"] for row in rows) == 0:
            return "no answer of any step had code; raise --max-new-tokens"
        return "all rewards of a group were equal in every step; raise --temperature"
    return ""


def resume_command(config):
    """The command line that continues this run."""
    start = ["python"]
    if parallel.WORLD > 1:
        start = ["torchrun", "--nproc-per-node", str(parallel.LOCAL_WORLD)]
        start.append("--")  # without it, torchrun takes --r for a flag of its own
    more = [] if config.resume else ["--resume"]
    return shlex.join([*start, *sys.argv, *more])
