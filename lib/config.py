"""The command line of a training script: every field of its Config is a flag.

A script's Config holds the settings of its algorithm; it inherits the others from Settings.
The comment behind a field is the help of its flag; the comment above some fields heads a group.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import reward


class BadInput(ValueError):
    """An error the user must fix. Its text is one line: what, where, the way out."""


def first_line(error):
    """The first line of an exception's text, or its type where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


ROOT = Path(__file__).parent.parent  # of the project
TINY = os.path.relpath(ROOT / "tiny")  # the embedded toy


@dataclass
class Settings:
    """Settings that every algorithm shares."""

    # model and data
    model: str = TINY  # checkpoint directory, hub id, or run, to go on from its adapter
    data: str = "zjunlp/ReCode-Train-Data"  # JSONL file or hub id of the migration examples
    heldout: str = ""  # JSONL file, or share of the notes to hold out; measured before and after
    max_prompt_tokens: int = 2048  # longer prompts are dropped
    resume: bool = False  # continue from the last checkpoint in --output
    seed: int = 42  # of the data order, the adapter and the samples
    # adapter
    adapter: str = "dora"  # what is trained: dora, lora, or none for all weights
    r: int = 64  # rank of the adapter
    alpha: float = 64.0  # the adapter is scaled by alpha / r
    dropout: float = 0.01  # on the adapter's input, in training
    targets: str = "q_proj,v_proj"  # names of the linear layers that get an adapter
    # optimizer
    warmup: float = 0.03  # share of the steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # memory and speed
    dtype: str = "auto"  # of frozen weights: fp32, bf16, or auto, the faster one here
    micro_tokens: int = 8192  # tokens per forward and backward pass, padding included
    keep_activations: bool | None = None  # no gradient checkpointing: faster; auto: if they fit
    dry_run: bool = False  # run one worst-case step, report memory and time, exit
    # log
    save_every: int = 100  # steps between checkpoints
    show_every: int = 10  # steps between sample completions
    log_to: str = ""  # also log to "tensorboard" or "wandb"; "" for neither
    quiet: bool = False  # print the header and the final table only

    # No flags, because they are not annotated: the values of a script without such a setting.
    num_samples = 1
    max_tries = 1
    overlong_cache = 0
    beta = 0.0


POSITIVE = (  # settings that must be above 0; the others may be 0
    "steps", "prompts_per_step", "num_samples", "max_tries", "updates", "max_prompt_tokens",
    "max_new_tokens", "temperature", "r", "alpha", "lr", "max_grad_norm", "micro_tokens",
    "save_every", "show_every",
)  # fmt: skip
CHOICES = {
    "adapter": ("dora", "lora", "none"),
    "correctness": reward.CORRECTNESS,
    "dtype": ("auto", "fp32", "bf16"),
    "log_to": ("", "tensorboard", "wandb"),
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated flags."""

    def __init__(self, description, **settings):
        settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, **settings)

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def read_settings(path):
    """The JSON object in a file, as a dict."""
    try:
        return {**json.loads(path.read_text())}  # a list is a TypeError
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read as a JSON object ({error})")


def described(Config):
    """{name: (heading, comment)} of every field of a Config, its own before inherited ones."""
    found = {}
    for cls in Config.__mro__[:-1]:
        heading = "settings"
        for line in inspect.getsource(cls).splitlines():
            if match := re.fullmatch(r"    # (.+)", line):
                heading = match[1]
            if match := re.fullmatch(r"    (\w+): [\w |]+ = .+?  # (.+)", line):
                found.setdefault(match[1], (heading, match[2]))
    if missing := {field.name for field in dataclasses.fields(Config)} - found.keys():
        raise TypeError(f"{Config.__module__}.Config: {missing}: a field needs a comment, its help")
    return found


def located(settings, place):
    """`settings` with its paths as seen from here; they are relative to the directory `place`."""
    found = dict(settings)
    for name in ("model", "data", "heldout"):
        path = place / str(settings.get(name))
        if settings.get(name) and path.exists():
            found[name] = os.path.normpath(path)
    return found


def read_run(path):
    """The settings of a run directory, from its config.json."""
    settings = read_settings(path / "config.json")
    if not isinstance(settings.get("model"), str):
        raise BadInput(f"{path}/config.json: names no model; give the directory of a run")
    return located(settings, Path(os.path.relpath(path.resolve() / settings.get("began_in", ""))))


def open_policy(name):
    """What --model names, as (base model, adapter directory or "", the settings that it brings).

    A checkpoint brings its defaults.json. A run directory is its adapter over the model that it
    began with, or its model/, and brings the settings of the run.
    """
    path = Path(name)
    if (path / "model" / "config.json").is_file():
        return str(path / "model"), "", read_run(path)
    if (path / "adapter" / "adapter_config.json").is_file():
        settings = read_run(path)
        return open_policy(settings["model"])[0], str(path / "adapter"), settings
    beside = path / "defaults.json"
    return name, "", located(read_settings(beside), path) if beside.is_file() else {}


FIXED = ("adapter", "r", "alpha", "targets")  # settings that the adapter of a run fixes


def model_defaults(model):
    """The settings that --model brings to training; from a run, those of its base and adapter."""
    base, adapter, settings = open_policy(model)
    if base == model:  # not a run
        return settings
    kept = {*FIXED, "dropout"} & settings.keys() if adapter else ()
    return model_defaults(settings["model"]) | {name: settings[name] for name in kept}


def add_flags(parser, Config, used):
    """A flag for every field of a Config; `used` are the defaults, which its help shows."""
    groups = {}
    for name, (heading, comment) in described(Config).items():
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        kind = type(getattr(Config, name))
        settings = {"type": kind, "metavar": "X"}
        if kind in (bool, type(None)):
            settings = {"action": argparse.BooleanOptionalAction}  # also --no-X
        default = {"": "none", None: "auto"}.get(used[name], used[name])
        settings["help"] = f"{comment} [{default}]".replace("%", "%%")
        groups[heading].add_argument("--" + name.replace("_", "-"), **settings)
    parser.set_defaults(**used)


def parse_config(Config, argv, doc):
    """A checked Config: its defaults, then those of --model, then the flags. Raises BadInput."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    finder = Parser(None, add_help=False)
    finder.add_argument("--model", default=defaults["model"])
    model = finder.parse_known_args(argv)[0].model
    used = defaults | model_defaults(model)
    for name, value in used.items():
        kind = type(defaults.get(name))
        wanted = {float: int | float, type(None): bool | None}.get(kind, kind)
        if name not in defaults or not isinstance(value, wanted):
            raise BadInput(f"--model {model}: its {name!r}: {value!r} is no setting of this script")
    parser = Parser(doc, epilog=f"Defaults in brackets are those used with --model {model}.")
    add_flags(parser, Config, used)
    config = Config(**vars(parser.parse_args(argv)))
    check_config(config)
    for name in FIXED if open_policy(model)[1] else ():
        now = getattr(config, name)
        if now != used[name]:
            why = f"the adapter of {model} has {used[name]}; tools.export makes it a model"
            raise BadInput(f"--{name} {now}: {why} that takes another")
    return config


def check_config(config):
    """Raise BadInput, naming the flag, where the values of `config` make no sense."""
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if name in POSITIVE and not value > 0:
            raise BadInput(f"{flag} {value}: must be above 0")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise BadInput(f"{flag} {value}: must be at least 0, and finite")
        if name in ("dropout", "warmup", "clip_low") and value >= 1:
            raise BadInput(f"{flag} {value}: is a share, must be below 1")
        if name in CHOICES and value not in CHOICES[name]:
            choices = ", ".join(filter(None, CHOICES[name]))
            raise BadInput(f"{flag} {value!r}: give one of {choices}")
    prompts = config.prompts_per_step
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if config.seed >= 2**32:
        raise BadInput(f"--seed {config.seed}: must be below 2**32")
    if vars(config).get("num_samples") == 1:  # sft.py has no such setting
        raise BadInput("--num-samples 1: advantages compare samples of a group; give at least 2")
    if prompts % config.updates:
        raise BadInput(f"--updates {config.updates}: must divide --prompts-per-step {prompts}")
    if prompts < ranks:
        raise BadInput(f"--prompts-per-step {prompts}: at least one for each of {ranks} ranks")
    if config.overlong_cache > config.max_new_tokens:
        raise BadInput(f"--overlong-cache {config.overlong_cache}: over --max-new-tokens")
    if config.adapter == "none" and config.beta:
        raise BadInput("--adapter none: has no reference policy; give --beta 0")
