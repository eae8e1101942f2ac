"""The machinery: what GRPO, DAPO and SFT share, in the order in which a run meets it.

  1. the command line    every field of a script's Config is a flag
  2. loading             a checkpoint directory or a hub id, through transformers
  3. export              a trained adapter (dora.py) merged into an ordinary checkpoint
  4. rollouts            completions and their rewards, the figures that describe them, held-out tasks
  5. set-up              model, tokenizer, tasks, run directory and the header that tells of them
  6. migration           what all of it is for: a trained model rewrites a file

    python recode.py old.py --model runs/grpo --library numpy --version 2.0 --update "np.in1d is gone; use np.isin"

Nothing is merged for sampling: in bf16 a merge would round half of a small update away, and the
probabilities that are trained would not be those that were sampled from.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from statistics import fmean as mean

import huggingface_hub
import safetensors.torch
import torch
import transformers
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import dora
import parallel
import patch
import reward
from data import BadInput
from policy import Batch, batch_logps, make_batch, passes, sample, token_logps  # noqa: F401, asked for by these names
from run import Run, read_settings, style, write

# ------------------------------------------------------------------------- 1. the command line

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
    if config.prompts_per_step < parallel.WORLD:
        raise BadInput(f"--prompts-per-step {config.prompts_per_step}: at least one for each of {parallel.WORLD} ranks")
    if config.adapter not in ("dora", "lora", "none"):
        raise BadInput(f"--adapter {config.adapter!r}: give dora, lora or none")
    if config.adapter == "none" and config.beta:
        raise BadInput("--adapter none: without an adapter to switch off there is no reference policy; give --beta 0")
    if config.offload and config.adapter != "none":
        raise BadInput("--offload: there is nothing to move to the CPU but with --adapter none")
    if config.correctness not in reward.CORRECTNESS:
        raise BadInput(f"--correctness {config.correctness!r}: give one of {', '.join(reward.CORRECTNESS)}")
    return config


OUT_OF_MEMORY = """
  In this order: a smaller --micro-tokens (half, say; changes no result); no --keep-activations; fewer
  --prompts-per-step or --num-samples; shorter --max-new-tokens or --max-prompt-tokens; with --adapter none,
  --offload or more GPUs. --dry-run tries the largest step first. What was saved goes on with --resume."""


def guard(main):
    """Run `main` as a program: its result is the exit status, bad input one line and status 2."""
    try:
        status = main(sys.argv[1:])
        parallel.end()
        sys.exit(status)
    except BadInput as error:
        parallel.say(error)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        parallel.say(f"{first_line(error)} {OUT_OF_MEMORY}")
        sys.exit(1)
    except RuntimeError:
        if not parallel.failed():
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        if parallel.RANK == 0:
            print("\nstopped", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------- 2. loading


def load_tokenizer(model):
    """The tokenizer of a checkpoint directory or hub id. BadInput without one, or without an EOS."""
    path = Path(model)
    if path.is_dir() and not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise BadInput(f"model: no tokenizer in {model!r}; save one there with tokenizer.save_pretrained")
    if not path.is_dir() and (path.exists() or not data.HUB_ID.fullmatch(model)):
        raise BadInput(f"model: no directory {model!r}; give a checkpoint directory or a hub id")
    huggingface_hub.logging.set_verbosity_error()  # its retries are no news; their outcome is
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model: no tokenizer for {model!r}: {first_line(error)}; give a checkpoint directory")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model: the tokenizer of {model!r} has no EOS token; set tokenizer.eos_token and save it")
    return tokenizer


def load_model(model):
    """The causal language model of a directory or hub id: fp32 on the CPU, bf16 on a GPU, eval mode.

    For a toy of under two million parameters torch is set to one thread: several win little where the
    cores are free, and where they are not (a shared machine) waiting for each other costs ten times the work.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise BadInput(f"model: cannot load {model!r}: {first_line(error)}")
    if device == "cpu" and loaded.num_parameters() < 2_000_000:
        torch.set_num_threads(1)
    return loaded.to(device).eval()


def eos_ids(model, tokenizer):
    """The ids that end a completion, list[int]: what `generate` would stop at, and the tokenizer's own."""
    listed = model.generation_config.eos_token_id  # an int, a list of them, or None
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return sorted({tokenizer.eos_token_id, *listed})


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


# ------------------------------------------------------------------------- 3. export


@torch.no_grad()
def export(model, adapter, output):
    """Merge an adapter into its model and save it as an ordinary checkpoint directory, in W's dtype.

    Prints how much of the update survives the rounding to that dtype. vLLM and others load the result.
    """
    tokenizer = load_tokenizer(model)
    merged = dora.load_adapter(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), adapter)
    wanted = lost = 0.0
    for name, layer in dora.dora_layers(merged).items():
        W = layer.base.weight.float()
        exact = W + layer.scale * layer.lora_B @ layer.lora_A
        if layer.magnitude is not None:
            exact *= (layer.magnitude / layer.norm())[:, None]  # eq. 1 of dora.py
        layer.base.weight.copy_(exact)
        wanted += (exact - W).square().sum().item()
        lost += (exact - layer.base.weight.float()).square().sum().item()
        parent, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(parent), leaf, layer.base)
    write_model(merged, tokenizer, output, f"{model} with the adapter {adapter} merged into it.")
    share = math.sqrt(lost / max(wanted, 1e-30))
    print(f"merged into {output} as {merged.dtype}: rounding loses {share:.2%} of the update")


SHARD = "5GB"  # of weights in a file
CARD = """---
base_model: {base}
tags: [recode, code-migration]
---
{what}

It was trained to follow the update notes that a prompt shows (ReCode, arXiv 2506.20495). Prompt and answer have
the form of data.py: a system message, the notes in <doc>, the old code, then a thought and <answer>.
"""


def write_model(model, tokenizer, directory, what):
    """Save an ordinary checkpoint directory: config, tokenizer, model card, weights in files of SHARD at most.

    Trained slices are put together one by one on rank 0, in bf16 if they were used in it.
    """
    state, base = {}, model.config.name_or_path
    for name, p in model.named_parameters():
        x = parallel.whole(p.detach())
        x = x.bfloat16() if isinstance(p, DTensor) and x.is_cuda else x
        state[name] = x.cpu() if parallel.RANK == 0 else None
    if parallel.RANK > 0:
        return
    try:
        model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD)
        tokenizer.save_pretrained(directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"cannot write {directory}: {first_line(error)}; make room, then --resume")
    write(Path(directory) / "README.md", CARD.format(base=base, what=what).encode())


# ------------------------------------------------------------------------- 4. rollouts and their figures


@dataclasses.dataclass
class Group:
    """One task and its completions, lists of ids with their EOS. Those that were sampled also have
    their texts, their rewards, and whether they were cut at max_new_tokens."""

    prompt: list
    example: data.Example
    completions: list
    texts: list = ()
    rewards: list = ()
    cut: list = ()


def complete(model, tokenizer, prompts, num_samples, max_new_tokens, temperature=1.0, seed=0, top_p=1.0):
    """What sample() draws, as four lists with an item for each of its rows: the ids of a completion with their
    EOS, its text without, whether it was cut at max_new_tokens, its log-probability."""
    eos = eos_ids(model, tokenizer)
    tokens, mask, logps = sample(model, prompts, num_samples, max_new_tokens, eos, temperature, seed, top_p)
    rows = [ids[kept].tolist() for ids, kept in zip(tokens.cpu(), mask.cpu())]
    plain = [[i for i in ids if i not in eos] for ids in rows]
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in plain]
    return rows, texts, [ids[-1] not in eos for ids in rows], logps.sum(1).tolist()


def rollout(model, tokenizer, tasks, config, num_samples, temperature, seed):
    """Complete and score `tasks`, each `num_samples` times: a list of Groups, and the seconds it took.

    Every rank does its share. What is drawn for task i hangs on seed + i, so it does not matter who draws it.
    """
    started, groups, answers = time.perf_counter(), [], ([], [], [], [])
    parallel.gather_weights(model)
    mine, seeds = parallel.share(tasks), parallel.share(range(seed, seed + len(tasks)))
    if mine:  # else there are fewer tasks than ranks
        prompts = [prompt for prompt, _ in mine]
        answers = complete(model, tokenizer, prompts, num_samples, config.max_new_tokens, temperature, seeds)
    sampled = time.perf_counter()
    lost = not all(map(math.isfinite, answers[-1]))  # weights that overflowed: no rewards, so that the run ends
    for i, (prompt, example) in enumerate(mine):  # groups by position, never by content
        completions, texts, cut, _ = (column[i * num_samples : (i + 1) * num_samples] for column in answers)
        rewards = [math.nan if lost else reward.score(text, example.new_code, config.correctness) for text in texts]
        groups.append(Group(prompt, example, completions, texts, rewards, cut))
    groups = parallel.gather(groups)
    return groups, {"seconds_sample": sampled - started, "seconds_score": time.perf_counter() - sampled}


def judge(groups):
    """Means over all completions: format (a share), es, em, stale (each in [0, 1]) and reward."""
    pairs = [(text, group.example) for group in groups for text in group.texts]
    return {
        "format": mean(reward.format_reward(text) > 0 for text, _ in pairs),
        "es": mean(reward.es(text, example.new_code) for text, example in pairs),
        "em": mean(reward.em(text, example.new_code) for text, example in pairs),
        "stale": mean(reward.stale(text, example.old_code, example.new_code) for text, example in pairs),
        "reward": mean(r for group in groups for r in group.rewards),
    }


def describe(groups):
    """The figures of a rollout: those of judge(), the spread within groups, lengths; plain floats."""
    several = len(groups[0].rewards) > 1  # one answer has no spread
    return judge(groups) | {
        "reward_std": mean(torch.tensor(group.rewards).std().item() if several else 0.0 for group in groups),
        "no_spread": mean(max(group.rewards) == min(group.rewards) for group in groups),
        "completion_length": mean(len(ids) for group in groups for ids in group.completions),
        "truncated": mean(cut for group in groups for cut in group.cut),
    }


def evaluate(model, tokenizer, tasks, config):
    """Figures over held-out `tasks`: those of judge() for greedy answers, but the reward of sampled ones."""
    size, greedy, sampled = config.prompts_per_step * config.num_samples, [], []
    hidden = config.quiet or parallel.RANK > 0 or None
    for start in tqdm(range(0, len(tasks), size), "held-out tasks", leave=False, disable=hidden):
        part = tasks[start : start + size]
        greedy += rollout(model, tokenizer, part, config, 1, 0, start)[0]
        sampled += rollout(model, tokenizer, part, config, 1, config.temperature, start)[0]
    return judge(greedy) | {"reward": judge(sampled)["reward"]}


def table(before, after):
    """The held-out figures side by side, as text."""
    names = {"em": "exact match", "stale": "stale rate", "format": "format", "es": "ES", "reward": "sampled reward"}
    rows = [f"  {'held-out tasks':<16}{'before':>9}{'after':>9}{'change':>9}"]
    rows += [f"  {names[k]:<16}{before[k]:9.3f}{after[k]:9.3f}{after[k] - before[k]:+9.3f}" for k in names]
    return "\n".join(rows)


# ------------------------------------------------------------------------- 5. set-up


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
        figures = {"before": state["before"], "after": evaluate(model, tokenizer, heldout, run.config)}
        write(run.path / "heldout.json", json.dumps(figures, indent=2).encode())
        print(table(**figures))
    kept = "model" if run.config.adapter == "none" else "adapter"
    print(f"done: {run.path}/ holds metrics.jsonl, samples.jsonl, curve.svg, checkpoint/ and {kept}/")
    return 0


# ------------------------------------------------------------------------- 6. migration

USAGE = """Rewrite a Python file for a new version of a library, as the update notes say, and print the diff.

    python recode.py old.py --model runs/grpo --library numpy --version 2.0 \\
        --update "np.in1d was removed; use np.isin"
    git show HEAD:old.py | python recode.py - --library numpy --version 2.0 --update-file notes.txt

The model answers several times. Answers without code, or whose code does not parse, are left out;
of the others the one is taken that they agree with most. Read the diff before you trust it: nothing
is run. The exit status is 0 if there is nothing to change, 1 if there is, 2 for bad input, 3 if no
answer is usable.
"""


def agreement(codes):
    """How much the others resemble each code, list[float]: the mean ES to them, comments aside; 0.0 without others."""
    codes = [reward.strip_comments(code) for code in codes]
    others = [[reward.similarity(a, b) for j, b in enumerate(codes) if j != i] for i, a in enumerate(codes)]
    return [mean(row) if row else 0.0 for row in others]


def migrate(model, tokenizer, example, num_samples, max_new_tokens, temperature=0.8, seed=0):
    """The new code of `example`, whose new_code is not looked at, and how it was found: (str or None, dict).

    Of `num_samples` answers those without code or that do not parse are left out. Of the others that
    one is taken which they agree with most, and of equals the likeliest. None if no answer is left.
    """
    prompt = data.encode_prompt(example, tokenizer)
    _, texts, cut, logps = complete(model, tokenizer, [prompt], num_samples, max_new_tokens, temperature, seed)
    codes = [reward.extract_code(text) or "" for text in texts]
    some = [i for i, code in enumerate(codes) if reward.strip_comments(code)]
    usable = [i for i in some if reward.parses(codes[i])]
    shares = agreement([codes[i] for i in usable])
    best = max(zip(shares, (logps[i] for i in usable), usable), default=(None, None, None))
    details = {
        "answers": num_samples, "usable": len(usable), "without_code": num_samples - len(some),
        "not_parsed": len(some) - len(usable), "cut": sum(cut),
        "agreement": best[0] if len(usable) > 1 else None,
    }  # fmt: skip
    return codes[best[2]] if usable else None, details


def open_policy(name):
    """What --model names, as (base model, adapter directory or "", settings that it brings).

    A run directory stands for its adapter over the model that it began with, or for its model/.
    """
    path, beside = Path(name), Path(name) / "defaults.json"
    if (path / "model" / "config.json").is_file():
        return str(path / "model"), "", read_settings(path / "config.json")
    if not (path / "adapter" / "adapter_config.json").is_file():
        return name, "", read_settings(beside) if beside.is_file() else {}
    settings = read_settings(path / "config.json")
    base, output = str(settings.get("model", "")), str(Path(settings.get("output", "")))
    began = Path(str(path.resolve()).removesuffix(output))  # where the run was started; its paths are relative to it
    places = [place / base for place in (began, Path(), Path(__file__).parent) if (place / base).is_dir()]
    return str(places[0]) if base and places else base, str(path / "adapter"), settings


def load_policy(base, adapter):
    """The model in eval mode, with its adapter if there is one. BadInput if the two do not fit."""
    model = load_model(base)
    try:
        return dora.load_adapter(model, adapter) if adapter else model
    except (KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise BadInput(f"--model: {adapter} does not fit {base}, or is damaged: {first_line(error)}")


def parse_migration(argv):
    """The checked arguments of this file as a program."""
    parser = Parser(USAGE)
    parser.add_argument("file", help="Python file to migrate, - for stdin")
    group = parser.add_argument_group("what changed")
    group.add_argument("--library", required=True, metavar="X", help="name of the library (required)")
    group.add_argument("--version", required=True, metavar="X", help="its new version (required)")
    notes = group.add_mutually_exclusive_group(required=True)
    notes.add_argument("--update", metavar="TEXT", help="what changed, in words (this or the next is required)")
    notes.add_argument("--update-file", metavar="FILE", help="the same from a file: release notes, say")
    group = parser.add_argument_group("who answers")
    group.add_argument("--model", metavar="X", help="run directory, checkpoint directory or hub id [tiny, a toy]")
    group.add_argument("--num-samples", default=8, type=int, metavar="X", help="answers to choose from [8]")
    group.add_argument("--temperature", default=0.8, type=float, metavar="X", help="of the answers, 0 is greedy [0.8]")
    group.add_argument("--max-prompt-tokens", type=int, metavar="X", help="longer is refused [what the model can take]")
    text = "longer answers are cut [as in training, or twice the file if that is more]"
    group.add_argument("--max-new-tokens", type=int, metavar="X", help=text)
    group.add_argument("--seed", default=42, type=int, metavar="X", help="of the answers [42]")
    group = parser.add_argument_group("what becomes of it")
    group.add_argument("--write", action="store_true", help="change the file; a copy stays in FILE.bak [off]")
    group.add_argument("--json", action="store_true", help="one JSON object in place of the diff [off]")
    args = parser.parse_args(argv)
    if min(args.num_samples, args.max_new_tokens or 1, args.max_prompt_tokens or 1) < 1:
        raise BadInput("--num-samples, --max-new-tokens and --max-prompt-tokens must be at least 1")
    if not 0 <= args.temperature < math.inf or not 0 <= args.seed < 2**32:
        raise BadInput("--temperature must be at least 0, --seed in [0, 2**32)")
    args.num_samples = args.num_samples if args.temperature else 1  # all would be equal, and that is no agreement
    if args.write and args.file == "-":
        raise BadInput("--write: there is no file to write when the code comes from stdin")
    args.update = patch.read_text(args.update_file) if args.update is None else args.update
    for flag, value in (("--library", args.library), ("--version", args.version), ("the update", args.update)):
        if not value.strip() or re.search("[\ud800-\udfff]", value):
            raise BadInput(f"{flag}: empty, or not valid Unicode; say what changed in which library")
    if args.model is None:
        print("note: without --model the embedded toy answers, which knows made-up libraries only", file=sys.stderr)
        args.model = os.path.relpath(Path(__file__).parent / "tiny")
    return args


def room(model, tokenizer, example, settings, args):
    """How many tokens an answer may have, at most what the model's context leaves. BadInput for too long a prompt."""
    prompt, code = len(data.encode_prompt(example, tokenizer)), len(tokenizer.encode(example.old_code))
    if args.max_prompt_tokens and prompt > args.max_prompt_tokens:
        raise BadInput(f"the prompt has {prompt:,} tokens, --max-prompt-tokens {args.max_prompt_tokens:,} at most")
    context = getattr(model.config, "max_position_embeddings", math.inf)
    new = args.max_new_tokens or min(max(settings.get("max_new_tokens", 1024), 2 * code), context - prompt)
    if prompt + max(new, code) > context:
        raise BadInput(f"the prompt has {prompt:,} tokens: no room for the answer in {context:,}; give less at a time")
    return new


def report(args, text, code, details):
    """Print what came out of a migration, write it if asked to, and return the exit status."""
    after = text if code is None else patch.splice(text, code)
    lines = patch.unified(text, after, "stdin" if args.file == "-" else args.file)
    backup = patch.overwrite(args.file, text, after) if args.write and lines else None
    if args.json:
        known = {name: vars(args)[name] for name in ("file", "library", "version", "model")}
        found = {"changed": bool(lines), "code": None if code is None else after, "diff": "".join(lines)}
        print(json.dumps(known | found | {"backup": backup and str(backup)} | details))
    else:
        colours = {"+": "32", "-": "31", "@": "36"}
        print("".join(style(line, colours[line[0]]) if line[0] in colours else line for line in lines), end="")
    counts = f"{details['without_code']} without code, {details['not_parsed']} that do not parse"
    if code is None:
        way_out = "raise --max-new-tokens" if details["cut"] else "try another --seed or --model"
        print(f"error: no answer is usable: {counts}, {details['cut']} cut; {way_out}", file=sys.stderr)
        return 3
    agree = "" if details["agreement"] is None else f", agreement {details['agreement']:.2f}"
    print(f"{details['usable']} of {details['answers']} answers are usable{agree}", file=sys.stderr)
    if backup:
        print(f"written; the old one is {backup}", file=sys.stderr)
    elif not lines:
        print("the answer equals the file: nothing to change", file=sys.stderr)
    return 1 if lines else 0


def main(argv=None):
    """Migrate a file. The exit status: 0 nothing to change, 1 changed, 3 no answer is usable."""
    args = parse_migration(argv)
    text, code = patch.read_code(args.file)
    if args.write:
        patch.check_writable(args.file)
    example = data.Example(args.library, args.version.removeprefix("=="), "", args.update.strip(), code, "")
    base, adapter, settings = open_policy(args.model)
    tokenizer, model = load_tokenizer(base), load_policy(base, adapter)
    new_tokens = room(model, tokenizer, example, settings, args)
    code, details = migrate(model, tokenizer, example, args.num_samples, new_tokens, args.temperature, args.seed)
    return report(args, text, code, details)


if __name__ == "__main__":
    guard(main)
