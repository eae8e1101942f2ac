"""The run directory: everything a run leaves behind, complete and readable while it goes on.

    config.json      every setting                     curve.svg    reward, exact match, stale rate
    metrics.jsonl    one row of figures a step         adapter/     the trained part, as PEFT saves it
    samples.jsonl    prompts, completions, rewards     model/       or the whole of it, at the end
    heldout.json     held-out figures, at the end      checkpoint/  all that --resume needs
    tensorboard/, wandb/    the same figures for another program, with --log-to

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
import resource
import secrets
import signal
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import data
import recode
from training import dora, parallel
from training.config import BadInput, read_settings
from training.curve import curve
from training.files import write
from training.loading import load_model, load_tokenizer, write_model

MAY_CHANGE = (  # between a run and its --resume
    "resume", "output", "steps", "save_every", "show_every", "log_to", "quiet", "offload", "micro_tokens",
    "keep_activations", "dry_run",
)  # fmt: skip
LOGS = ("metrics.jsonl", "samples.jsonl")


# figure, heading, format of a step's row on the screen
COLUMNS = (
    ("step", "step", "5d"), ("reward", "reward", "7.3f"), ("reward_std", "std", "6.3f"), ("format", "format", "7.2f"),
    ("es", "ES", "6.3f"), ("em", "exact", "6.2f"), ("stale", "stale", "6.2f"), ("loss", "loss", "8.4f"),
    ("kl", "kl", "8.5f"), ("clip_fraction", "clip", "6.3f"), ("grad_norm", "grad", "6.2f"), ("lr", "lr", "9.1e"),
    ("completion_length", "tokens", "7.1f"), ("tokens_per_second", "tok/s", "6.0f"),
)  # fmt: skip


def style(text, code):
    """`text` in an ANSI style ("1" bold, "2" dim), but plain where no terminal shows it or NO_COLOR is set."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[{code}m{text}\033[0m"


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
        f"note: {' '.join(group.example.update_info.split())}",
        *f"<think>{group.texts[0]}".split("\n"),
    ]
    clean = lambda line: "".join(char if char.isprintable() else " " for char in line)  # no commands to the terminal
    return "\n" + "\n".join(style(f"    | {clean(line[:92])}", "2") for line in lines[:20]) + "\n"


def opener(name):
    """What opens the other log that --log-to names, None for "". BadInput where it is unknown or not installed."""
    if name not in ("", "tensorboard", "wandb"):
        raise BadInput(f"--log-to {name!r}: give tensorboard or wandb")
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter as found
        elif name == "wandb":
            from wandb import init as found
    except ImportError:
        raise BadInput(f"--log-to {name}: it is not installed; pip install {name}")
    return found if name else None


def mirror(config, step):
    """Open the other log of --log-to for steps from `step` on: the functions add(row) and close().

    What a killed run told it of later steps is done anew: TensorBoard forgets those rows, wandb keeps
    the first it got, and on a CPU the two are the same.
    """
    open_log, path = opener(config.log_to), Path(config.output)
    if parallel.RANK > 0:
        return lambda row: None, lambda: None
    if config.log_to == "tensorboard":
        writer = open_log(path / "tensorboard", purge_step=step)

        def add(row):
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name, value, row["step"])
            writer.flush()

        return add, writer.close
    if config.log_to == "wandb":
        from wandb import Error

        name = path / "wandb" / "id"  # of this run on the server, also after --resume
        if not name.is_file():
            write(name, secrets.token_hex(4).encode())
        try:
            again = {"id": name.read_text(), "resume": "allow", "allow_val_change": True}
            there = open_log(project="recode", dir=path, config=asdict(config), **again)
        except Error as error:
            raise BadInput(f"--log-to wandb: {' '.join(str(error).split())}; or set WANDB_MODE=offline")
        return lambda row: row["step"] < there.step or there.log(row, step=row["step"]), there.finish
    return lambda row: None, lambda: None


class Run:
    """The run directory: config.json, metrics.jsonl, samples.jsonl, curve.svg, checkpoint/, adapter/."""

    def __init__(self, config):
        """Claim config.output for a new run, or check that it holds the run to go on with."""
        self.config, self.path, self.rows = config, Path(config.output), []
        opener(config.log_to)  # tells now if it is missing
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
        """Around the training loop: the progress bar, the log of --log-to, and the Stop that Ctrl-C sets."""
        stop, hidden = Stop(), self.config.quiet or parallel.RANK > 0 or None  # None: hidden where no terminal is
        self.add, close = mirror(self.config, done + 1)
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=self.config.steps, initial=done, unit="step", disable=hidden, leave=False) as self.bar:
                yield stop
        finally:
            close()
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

    def say(self, text):
        """A line for the screen, above the bar, unless the run is --quiet."""
        if not self.config.quiet:
            tqdm.write(text)

    def log(self, figures, groups):
        """A step's row for the file and the screen; now and then its first group of samples and the curve."""
        if parallel.RANK > 0:
            return
        seconds = sum(value for name, value in figures.items() if name.startswith("seconds"))
        tokens = sum(len(ids) for group in groups for ids in group.completions)
        row = self.append("metrics.jsonl", {**figures, "tokens_per_second": tokens / seconds})
        self.rows.append(row)
        self.add(row)
        if self.estimate:
            self.estimate, left = False, (self.config.steps - row["step"]) * seconds
            self.say(f"estimate  {left:,.0f} seconds for the steps to come, by the first of them\n")
            heading = "".join(f"{title:>{int(re.match('[0-9]+', form)[0])}}" for _, title, form in COLUMNS)
            self.say(style(heading, "1"))
        self.say("".join(f"{math.nan if row[name] is None else row[name]:{form}}" for name, _, form in COLUMNS))
        self.bar.update()
        if row["step"] % self.config.show_every == 0 or row["step"] in (1, self.config.steps):
            for text, reward in zip(groups[0].texts, groups[0].rewards):
                sample = {"update_info": groups[0].example.update_info, "completion": text, "reward": reward}
                self.append("samples.jsonl", {"step": row["step"], **sample})
            self.say(show(row["step"], groups[0]))
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


# ------------------------------------------------------------------------- beginning and end


def load_trainable(config):
    """The model with what is trained of it: an adapter, or all weights in slices. Prints its lines of the header."""
    print(f"model     {config.model}", flush=True)
    torch.manual_seed(config.seed)
    model = load_model(config.model)
    if config.adapter != "none":
        dora.add_dora(model, config.r, config.alpha, config.dropout, config.targets, config.adapter == "dora")
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    print(f"          {total - trained:,} parameters frozen, {model.dtype} on {model.device}")
    what = {"dora": f"DoRA, r {config.r}, on {config.targets}", "lora": f"LoRA, r {config.r}, on {config.targets}"}
    print(f"          {trained:,} trained: {what.get(config.adapter, 'all weights, in fp32')}")
    if config.adapter == "none":
        parallel.shard(model, config.offload)
    if not config.keep_activations:
        recompute = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        recompute({"use_reentrant": False})  # the second is its name in transformers 5.17
    return model


def set_up(config):
    """Everything a training script starts from: (run, model, tokenizer, train tasks, held-out tasks).

    Checks what can be checked before anything slow is done, and prints the header. A task is
    (prompt ids, Example).
    """
    parallel.start()
    run, dropped = Run(config), Counter()
    tokenizer = load_tokenizer(config.model)
    examples = data.load_examples(config.data, dropped)
    train, heldout = data.split_heldout(config.heldout, examples, config.seed)
    train = data.encode_tasks(train, tokenizer, config.max_prompt_tokens, dropped)
    heldout = data.encode_tasks(heldout, tokenizer, config.max_prompt_tokens, Counter()) if heldout else []
    print(f"data      {config.data}: {len(train):,} tasks kept, {sum(dropped.values()):,} rows dropped")
    for reason, count in dropped.items():
        print(f"          {count:,} dropped: {reason}")
    print(f"held out  {len(heldout):,} tasks" + (f" of {config.heldout}" if heldout else "; --heldout sets some aside"))
    if tokenizer.chat_template is None:
        print("warning   the tokenizer has no chat template; prompts are plain text")
    model = load_trainable(config)
    if parallel.WORLD > 1:
        print(f"ranks     {parallel.WORLD}, each its share of the prompts")
    defaults = Path(config.model) / "defaults.json"
    if defaults.is_file() and not config.quiet:
        listed = ", ".join(f"{name} {value}" for name, value in read_settings(defaults).items())
        print(textwrap.fill(f"defaults  {listed}", 100, subsequent_indent=" " * 10))
    print(
        f"run       {run.path}: {config.steps:,} steps of {config.prompts_per_step} x {config.num_samples} completions"
    )
    if not config.dry_run:
        run.begin()
    return run, model, tokenizer, train, heldout


LOST = 3  # updates in a row that are not finite, before a run gives up


def learning_rate(step, config):
    """The rate of step 0, 1, ...: linear warm-up, then half a cosine down to 0 at the last step's end."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warm) / (config.steps - warm))) / 2


def save(run, model, optimizer, state):
    """A checkpoint to go on from, and the adapter as it is now."""
    run.save(parallel.full_state(model, optimizer), state)
    if run.config.adapter != "none":
        dora.save_adapter(model, run.config, run.path / "adapter")


def finish(run, model, tokenizer, optimizer, heldout, state):
    """After the loop: save, say what came out of it, and return the exit status."""
    if state["lost"] == LOST:
        print(f"stopped: loss or gradient not finite {LOST} times in a row, up to step {state['step']}")
        print(f"the last checkpoint before is kept in {run.path}; lower --lr and start anew")
        return 1
    save(run, model, optimizer, state)
    if run.config.adapter == "none":
        write_model(model, tokenizer, run.path / "model", f"{run.config.model} trained by {' '.join(sys.argv)}.")
    if state["step"] < run.config.steps:
        again = sys.argv if run.config.resume else [*sys.argv, "--resume"]
        start = f"torchrun --nproc-per-node {parallel.LOCAL_WORLD}" if parallel.WORLD > 1 else "python"
        print(f"stopped after step {state['step']}, all saved in {run.path}; to go on:\n  {start} {' '.join(again)}")
        return 130
    if heldout:
        figures = {"before": state["before"], "after": recode.evaluate(model, tokenizer, heldout, run.config)}
        if parallel.RANK == 0:
            write(run.path / "heldout.json", json.dumps(figures, indent=2).encode())
        print(table(**figures))
    kept = "model" if run.config.adapter == "none" else "adapter"
    print(f"done: {run.path}/ holds metrics.jsonl, samples.jsonl, curve.svg, checkpoint/ and {kept}/")
    return 0


def table(before, after):
    """The held-out figures side by side, as text."""
    names = {"em": "exact match", "stale": "stale rate", "format": "format", "es": "ES", "reward": "sampled reward"}
    rows = [f"  {'held-out tasks':<16}{'before':>9}{'after':>9}{'change':>9}"]
    rows += [f"  {names[k]:<16}{before[k]:9.3f}{after[k]:9.3f}{after[k] - before[k]:+9.3f}" for k in names]
    return "\n".join(rows)


def peak_bytes(device):
    """The most memory so far: of the GPU what torch has had allocated, of a CPU process everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def dry_run(model, tasks, optimizer, config, update):
    """The largest step that can come: the longest prompt, every completion of full length. Prints what it takes.

    The model is of no use afterwards, for it has learned from random rewards. Returns the exit status, 0.
    """
    parallel.gather_weights(model)
    before, start = peak_bytes(model.device), time.perf_counter()
    longest, P, G = max((prompt for prompt, _ in tasks), key=len), config.prompts_per_step, config.num_samples
    mine = len(parallel.share(range(P)))
    tokens, _, _ = recode.sample(model, [longest] * mine, G, config.max_new_tokens, [], config.temperature, 0)
    sampled = time.perf_counter() - start
    completions = [tokens[i % len(tokens)].tolist() for i in range(P * G)]
    groups = [recode.Group(longest, None, completions[i * G : (i + 1) * G]) for i in range(P)]
    batch = recode.make_batch(groups, torch.randn(P, G), model.device)
    updated = update(model, optimizer, batch, config)["seconds_update"]
    hours = (sampled + updated) * config.steps / 3600
    print(f"dry run   one step of {P} x {G} completions of {config.max_new_tokens:,} tokens, prompt {len(longest):,}")
    print(f"          {sampled:.1f} s to sample, {updated:.1f} s to update; {config.steps:,} steps: {hours:.1f} h at most")
    print(f"          peak {peak_bytes(model.device) / 1e9:.2f} GB; before the step {before / 1e9:.2f} GB")
    return 0
