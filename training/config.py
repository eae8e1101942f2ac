"""The command line: every field of a script's Config is a flag."""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
from pathlib import Path

import reward


class BadInput(ValueError):
    """Something only the user can mend. Its text is one line: what, where, the way out."""


def read_settings(path):
    """The JSON object in a file, as a dict."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read as a JSON object ({error})")


MAY_BE_ZERO = ("seed", "dropout", "beta", "warmup", "weight_decay", "overlong_cache")  # every other number is above 0


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, help of at most 100 columns, and no abbreviated flags."""

    def __init__(self, description):
        columns = min(100, shutil.get_terminal_size((100, 24)).columns)
        form = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=columns)
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def parse_config(Config, argv, doc):
    """A checked Config: its own defaults, then those of the checkpoint, then the flags of `argv`.

    The comment behind a field is the help of its flag, the comment above some fields their heading.
    MODEL/defaults.json holds the checkpoint's defaults; "data" and "heldout" in it may name files
    beside it. Raises BadInput for an unknown flag or a value that makes no sense.
    """
    parser = Parser(doc)
    parser.epilog = "Defaults are in brackets; those that a checkpoint brings (tiny/defaults.json) go before them."
    group, defaults = parser, {field.name: field.default for field in dataclasses.fields(Config)}
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif field := re.fullmatch(r"    (\w+): \w+ = .+?  # (.+)", line):
            name, default = field[1], defaults[field[1]]
            kind = {"action": "store_true"} if default is False else {"type": type(default), "metavar": "X"}
            shown = "off" if default is False else "none" if default == "" else default
            text = f"{field[2]} [{shown}]".replace("%", "%%")
            group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    path = Path(given.get("model", defaults["model"])) / "defaults.json"
    for name, value in read_settings(path).items() if path.is_file() else ():
        wanted = type(defaults.get(name))
        if name not in defaults or not isinstance(value, int | float if wanted is float else wanted):
            raise BadInput(f"{path}: {name!r}: {value!r} is no setting of this script")
        beside = path.parent / value if name in ("data", "heldout") else None
        given.setdefault(name, str(beside) if beside and beside.is_file() else value)
    return check(Config(**given))


def check(config):
    """`config` itself, if its values make sense; else BadInput naming the flag."""
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in MAY_BE_ZERO):
                raise BadInput(f"{flag} {value}: must be {'at least' if name in MAY_BE_ZERO else 'above'} 0")
    if config.seed >= 2**32:
        raise BadInput(f"--seed {config.seed}: must be below 2**32")
    if config.num_samples == 1 < type(config).num_samples:
        raise BadInput("--num-samples 1: advantages compare the samples of a group; give at least 2")
    if config.prompts_per_step % config.updates:
        raise BadInput(f"--updates {config.updates}: must divide --prompts-per-step {config.prompts_per_step}")
    if config.dropout >= 1 or config.warmup > 1:
        raise BadInput("--dropout must be below 1 and --warmup at most 1: both are shares")
    if vars(config).get("overlong_cache", 0) > config.max_new_tokens:
        raise BadInput(f"--overlong-cache {config.overlong_cache}: at most --max-new-tokens {config.max_new_tokens}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets it
    if config.prompts_per_step < ranks:
        raise BadInput(f"--prompts-per-step {config.prompts_per_step}: at least one for each of {ranks} ranks")
    if config.adapter not in ("dora", "lora", "none"):
        raise BadInput(f"--adapter {config.adapter!r}: give dora, lora or none")
    if config.adapter == "none" and config.beta:
        raise BadInput("--adapter none: without an adapter to switch off there is no reference policy; give --beta 0")
    if config.offload and config.adapter != "none":
        raise BadInput("--offload: there is nothing to move to the CPU but with --adapter none")
    if config.correctness not in reward.CORRECTNESS:
        raise BadInput(f"--correctness {config.correctness!r}: give one of {', '.join(reward.CORRECTNESS)}")
    return config
