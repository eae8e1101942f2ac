"""The machinery: what GRPO, DAPO and SFT share, in the order in which a run meets it.

  1. the command line    every field of a script's Config is a flag
  2. loading             a checkpoint directory or a hub id, through transformers
  3. export              a trained adapter (dora.py) merged into an ordinary checkpoint
  4. rollouts            completions and their rewards, the figures that describe them, held-out tasks
  5. set-up              model, tokenizer, tasks, run directory and the header that tells of them

Nothing is merged for sampling: in bf16 a merge would round half of a small update away, and the
probabilities that are trained would not be those that were sampled from.
"""

import argparse
import dataclasses
import inspect
import json
import math
import re
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
import reward
from data import BadInput
from policy import Batch, batch_logps, make_batch, passes, sample, token_logps  # noqa: F401, asked for by these names
from run import Run, read_settings, write

# ------------------------------------------------------------------------- 1. the command line

MAY_BE_ZERO = ("seed", "dropout", "beta", "warmup", "weight_decay", "overlong_cache")  # every other number is above 0


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see --help")


def parse_config(Config, argv, doc):
    """A checked Config: its own defaults, then those of the checkpoint, then the flags of `argv`.

    The comment behind a field is the help of its flag, the comment above some fields their heading.
    MODEL/defaults.json holds the checkpoint's defaults; "data" and "heldout" in it may name files
    beside it. Raises BadInput for an unknown flag or a value that makes no sense.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    group, defaults = parser, {field.name: field.default for field in dataclasses.fields(Config)}
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif field := re.fullmatch(r"    (\w+): \w+ = .+?  # (.+)", line):
            name, default = field[1], defaults[field[1]]
            kind = {"action": "store_true"} if default is False else {"type": type(default), "metavar": "X"}
            text = f"{field[2]} [{default}]".replace("%", "%%")
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


CARD = """---
base_model: {base}
tags: [recode, code-migration]
---
{what}

It was trained to follow the update notes that a prompt shows (ReCode, arXiv 2506.20495). Prompt and answer have
the form of data.py: a system message, the notes in <doc>, the old code, then a thought and <answer>.
"""


def write_model(model, tokenizer, directory, what):
    """Save an ordinary checkpoint directory: config, tokenizer, model card, weights in files of 5 GB at most.

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
        model.save_pretrained(directory, state_dict=state, max_shard_size="5GB")
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


def rollout(model, tokenizer, tasks, config, num_samples, temperature, seed):
    """Complete and score `tasks`, each `num_samples` times: a list of Groups, and the seconds it took.

    Every rank does its share. What is drawn for task i hangs on seed + i, so it does not matter who draws it.
    """
    eos, started, rows, lost = eos_ids(model, tokenizer), time.perf_counter(), [], False
    parallel.gather_weights(model)
    mine, seeds = parallel.share(tasks), parallel.share(range(seed, seed + len(tasks)))
    if mine:  # else there are fewer tasks than ranks
        prompts = [prompt for prompt, _ in mine]
        tokens, mask, logps = sample(model, prompts, num_samples, config.max_new_tokens, eos, temperature, seeds)
        rows = [ids[kept].tolist() for ids, kept in zip(tokens.cpu(), mask.cpu())]
        lost = not logps.isfinite().all()  # weights that overflowed: no rewards, so that the run sees it and ends
    sampled, groups = time.perf_counter(), []
    for i, (prompt, example) in enumerate(mine):  # groups by position, never by content
        completions = rows[i * num_samples : (i + 1) * num_samples]
        texts = [decode(tokenizer, ids, eos) for ids in completions]
        rewards = [math.nan if lost else reward.score(text, example.new_code, config.correctness) for text in texts]
        cut = [ids[-1] not in eos for ids in completions]
        groups.append(Group(prompt, example, completions, texts, rewards, cut))
    groups = parallel.gather(groups)
    return groups, {"seconds_sample": sampled - started, "seconds_score": time.perf_counter() - sampled}


def decode(tokenizer, ids, eos):
    """The text of a completion without its EOS."""
    return tokenizer.decode([i for i in ids if i not in eos], clean_up_tokenization_spaces=False)


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
    for start in tqdm(range(0, len(tasks), size), "held-out tasks", leave=False, disable=parallel.RANK > 0 or None):
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
    if parallel.WORLD > 1:
        print(f"ranks     {parallel.WORLD}, each its share of the prompts")
    defaults = Path(config.model) / "defaults.json"
    if defaults.is_file():
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
