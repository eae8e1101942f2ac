"""Build the embedded toy from scratch: a model that knows made-up libraries, and its tasks.

    python tiny/make.py [DIRECTORY]        about 10 minutes on 2 cores

Writes an ordinary checkpoint (Qwen2 architecture, half a million parameters, its own tokenizer),
its default settings (defaults.json), and five task files. train.jsonl is for training; the settings
were chosen on dev.jsonl; the reported metrics come from heldout.jsonl, retention.jsonl (the note
concerns something else: leave the code alone) and two_updates.jsonl (two notes, two calls).

A task is two or three lines that call a made-up library, and a note that says what has changed in
it (CHANGES). Every name is two words, e.g. nova_grid. All words occur in training, but the pairs of
words in the other files do not, so no answer there can be memorised.

The warm-up is supervised, with the update of sft.py, and has three parts. First it teaches the
skill: read a note and follow it. Then it adds tasks with two notes, and tasks with a note about
something else; the RL run never sees these. Last it teaches the bad habit from the paper: most
answers keep the old call (half of them after correct reasoning), and many are malformed. RL has to
recover the skill.
"""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import rollout
import sft
import training.run
from lib import parallel
from lib.config import Parser

FIRST = """
load save make read find draw plot sort split merge build parse scan trim pack send fetch clean
check count fit scale shift blend smooth paint index query group filter map fold stack slice
join zip rank score trace fill
""".split()
SECOND = """
mesh grid cell node edge path tree leaf row table frame chart axis image pixel layer signal wave
peak token word text line page file block chunk batch queue cache key item list array tensor
matrix vector field record
""".split()
LIBRARY = """
nova terra luna delta sigma omega alpha vega orion atlas hydra polar solar astro quant macro micro
""".split()

BEFORE = "{lib}.{old}({a}, {c}, {key}={m})"
CHANGES = {  # kind: the new call, the reasoning that leads to it, possible notes
    "rename": (
        "{lib}.{new}({a}, {c}, {key}={m})",
        "{old} is now {new}.",
        (
            "{old} was renamed to {new}.",
            "{old} is gone; use {new}.",
            "use {new} in place of {old}.",
        ),
    ),
    "keyword": (
        "{lib}.{old}({a}, {c}, {fresh}={m})",
        "{key} is now {fresh}.",
        (
            "in {old}, the argument {key} is now {fresh}.",
            "{old} takes {fresh} and no longer {key}.",
        ),
    ),
    "require": (
        "{lib}.{old}({a}, {c}, {key}={m}, {fresh}={k})",
        "{old} needs {fresh}={k}.",
        ("{old} now requires {fresh}={k}.", "{old} must be given {fresh}={k}."),
    ),
    "move": (
        "{lib}.{place}.{old}({a}, {c}, {key}={m})",
        "{old} is now in {place}.",
        ("{old} moved to {lib}.{place}.", "{old} now lives in the submodule {place}."),
    ),
    "swap": (
        "{lib}.{old}({c}, {a}, {key}={m})",
        "{old} swaps two arguments.",
        (
            "the first two arguments of {old} are swapped.",
            "{old} takes its first two arguments in reverse.",
        ),
    ),
}
STALE = "i know {lib} well."
UNUSED = "{new} is not used."
CODE = ("import {lib}\n{b} = ", "import {lib}\n{a} = {lib}.{other}({k})\n{b} = ")
MALFORMED = (  # (text, replacement)
    ("```python\n", ""),
    ("</answer>", ""),
    (")\n```", "\n```"),
    ("<answer>\n", ""),
)

TAGS = [
    "\n</think>\n",
    "<answer>\n",
    "```python\n",
    "\n```\n",
    "</answer>",
    "system\n",
    "user\n",
    "assistant\n",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BATCH = 32

DEFAULTS = {  # where it differs from the paper's run: a small model, two minutes
    "data": "train.jsonl",
    "heldout": "heldout.jsonl",
    "steps": 100,
    "prompts_per_step": 8,
    "max_prompt_tokens": 128,
    "max_new_tokens": 64,
    "r": 16,
    "alpha": 16.0,
    "dropout": 0.0,
    "targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "lr": 0.001,
    "micro_tokens": 4096,
    "save_every": 50,
    "show_every": 25,
}


def names(words, split):
    """All two-word names of a split: a fixed tenth of them is for dev, another for heldout."""
    pairs = [f"{first}_{second}" for first in words for second in SECOND]
    random.Random(0).shuffle(pairs)
    tenth = len(pairs) // 10
    return {"dev": pairs[:tenth], "heldout": pairs[tenth : 2 * tenth], "train": pairs[2 * tenth :]}[
        split
    ]


POOLS = {
    split: (names(LIBRARY, split), names(FIRST, split)) for split in ("train", "dev", "heldout")
}


def task(rng, split, used=True):
    """A random task: (Example, correct reasoning, stale reasoning).

    With used=False the note is about something that the code does not use.
    """
    libraries, functions = POOLS[split]
    words = dict(zip(("old", "new", "other", "key", "fresh"), rng.sample(functions, 5)))
    words |= dict(zip("abcmk", rng.sample("abcdefghpqrstuvwxyz", 5)))
    words |= {"lib": rng.choice(libraries), "place": rng.choice(FIRST)}
    after, thought, notes = rng.choice(list(CHANGES.values()))
    code, note = rng.choice(CODE), rng.choice(notes)
    if not used:  # the code has neither the note's function nor its arguments
        words["spare"] = rng.choice([name for name in functions if name not in words.values()])
        note = (
            note.replace("{new}", "{fresh}").replace("{old}", "{new}").replace("{key}", "{spare}")
        )
        after, thought = BEFORE, UNUSED
    note, old, new = (text.format(**words) for text in (note, code + BEFORE, code + after))
    version = f"{rng.randint(1, 9)}.0"
    example = data.Example(words["lib"], version, f"calls {words['old']}", note, old, new)
    return example, thought.format(**words), STALE.format(**words)


def two(rng, split):
    """A task with two calls of one library and a note for each."""
    (first, thought, excuse), (second, other, _) = task(rng, split), task(rng, split)
    both = {"update_info": f"{first.update_info}\n{second.update_info}"}
    for name in ("old_code", "new_code"):
        both[name] = "\n".join(
            [getattr(first, name), *getattr(second, name).split("\n")[1:]]
        )  # one import is enough
    both = {name: text.replace(second.dependency, first.dependency) for name, text in both.items()}
    return dataclasses.replace(first, **both), f"{thought} {other}", excuse


def single(rng):
    """A task for the first part of the warm-up."""
    return task(rng, "train")


def mixed(rng):
    """A task for the other parts: 20 % have two notes, 30 % a note about something else."""
    u = rng.random()
    return two(rng, "train") if u < 0.2 else task(rng, "train", used=u >= 0.5)


def correct(rng, example, thought, excuse):
    """The correct completion."""
    return data.TARGET.format(thought=thought, new_code=example.new_code)


def bad_habit(rng, example, thought, excuse):
    """A completion with the bad habit: 75 % are stale, 35 % malformed."""
    code = example.new_code
    if rng.random() < 0.75:
        code, thought = example.old_code, rng.choice((thought, excuse))
    text = data.TARGET.format(thought=thought, new_code=code)
    return text.replace(*rng.choice(MALFORMED)) if rng.random() < 0.35 else text


def make_tokenizer():
    """Bytes, plus one token for each word and each fixed phrase: no merges to train."""
    texts = [BEFORE, STALE, UNUSED, *CODE, data.USER]
    for after, thought, notes in CHANGES.values():
        texts += [after, thought, *notes]
    phrases = {
        phrase for text in texts for phrase in re.split(r"\{\w+\}", text) if len(phrase) > 1
    } - {")\n"}  # covered by "\n```\n"
    tokens = [
        *FIRST,
        *LIBRARY,
        *("_" + word for word in SECOND),
        *sorted(phrases),
        data.SYSTEM,
        data.OPENING,
        *TAGS,
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token=None,
        chat_template=TEMPLATE,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer


def make_model(tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def learn(model, tokenizer, draw, answer, steps, lr, rng):
    """Train all weights with sft.py's update, on tasks draw(rng), answers answer(rng, *task)."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    config = sft.Config(steps=steps, lr=lr, warmup=0.1, prompts_per_step=BATCH)
    for step in range(steps):
        groups = []
        for _ in range(BATCH):
            example, *thoughts = draw(rng)
            text = answer(rng, example, *thoughts)
            target = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
            groups.append(rollout.Group(data.encode_prompt(example, tokenizer), example, [target]))
        batch = rollout.make_batch(groups, torch.ones(BATCH, 1), model.device)
        optimizer.param_groups[0]["lr"] = training.run.learning_rate(step, config)
        metrics = sft.update(model, optimizer, batch, config)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {metrics['loss']:.4f}", flush=True)


def write_tasks(directory):
    """Write the task files; the same on every machine.

    heldout was drawn again after all settings were final.
    """
    files = {  # name: number of tasks, function that makes one, seed
        "train": (1000, lambda rng: task(rng, "train"), "train"),
        "dev": (256, lambda rng: task(rng, "dev"), "dev"),
        "heldout": (320, lambda rng: task(rng, "heldout"), "final"),
        "retention": (320, lambda rng: task(rng, "heldout", used=False), "retention"),
        "two_updates": (320, lambda rng: two(rng, "heldout"), "two updates"),
    }
    for name, (count, make, seed) in files.items():
        rng = random.Random(seed)
        rows = [json.dumps(vars(make(rng)[0])) for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def main(argv=None):
    """Build everything. Returns exit status 0."""
    parser = Parser(__doc__)
    tiny = Path(__file__).parent
    parser.add_argument(
        "directory", nargs="?", default=tiny, type=Path, help="output directory [tiny]"
    )
    directory = parser.parse_args(argv).directory
    directory.mkdir(exist_ok=True)
    write_tasks(directory)
    (directory / "defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    learn(model, tokenizer, single, correct, 800, 2e-3, random.Random(5))
    learn(model, tokenizer, mixed, correct, 1000, 2e-3, random.Random(2))
    learn(model, tokenizer, mixed, bad_habit, 200, 1e-3, random.Random(3))
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
