"""Make the embedded default from nothing: a toy model that knows toy libraries, and its tasks.

    python tiny/make.py [DIRECTORY]        about 10 minutes on 2 cores; the directory is tiny/ itself

Writes an ordinary checkpoint (Qwen2 architecture, 0.6 million parameters, own tokenizer), its
defaults.json, and three files of tasks: train.jsonl for RL, dev.jsonl on which the settings in
defaults.json were chosen, heldout.jsonl for the reported figures.

A task is two or three lines that call a made-up library, and a note that one thing in it changed:
a function renamed, a keyword renamed, a keyword newly required, a function moved to a submodule,
two arguments swapped. Every name is two words, nova_grid say. All words occur in training, but the
word pairs of dev.jsonl and heldout.jsonl never do, so nothing there can be known by heart.

The warm-up has two parts, both supervised. First the skill: notes are read and obeyed. Then the
paper's disease: most answers write the old call all the same (half of them after having reasoned
rightly), and many are malformed. What RL has to do is to bring back the first from under the second.
"""

import json
import random
import re
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import recode

FIRST = """load save make read find draw plot sort split merge build parse scan trim pack send fetch clean check count
fit scale shift blend smooth paint index query group filter map fold stack slice join zip rank score trace fill""".split()
SECOND = """mesh grid cell node edge path tree leaf row table frame chart axis image pixel layer signal wave peak
token word text line page file block chunk batch queue cache key item list array tensor matrix vector field record""".split()
LIBRARY = "nova terra luna delta sigma omega alpha vega orion atlas hydra polar solar astro quant macro micro".split()
NUMBERS = [str(n) for n in range(1, 10)]
SKILL, DISEASE, BATCH = 3000, 300, 64  # optimizer steps of the two parts, completions in each

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def names(words, split):
    """All two-word names of a split; a fixed tenth of them is for dev, another for heldout."""
    pairs = [f"{a}_{b}" for a in words for b in SECOND]
    random.Random(0).shuffle(pairs)
    tenth = len(pairs) // 10
    return {"dev": pairs[:tenth], "heldout": pairs[tenth : 2 * tenth], "train": pairs[2 * tenth :]}[split]


POOLS = {split: (names(FIRST, split), names(LIBRARY, split)) for split in ("train", "dev", "heldout")}


def task(rng, split, change=None):
    """A random task: (Example, right reasoning). `change` picks the kind, all five are as likely."""
    functions, libraries = POOLS[split]
    lib, (old, new, other, keyword, fresh) = rng.choice(libraries), rng.sample(functions, 5)
    a, b = rng.sample("abcdxyzuvw", 2)
    n, m, k = rng.sample(NUMBERS, 3)
    place = f"{rng.choice(FIRST)}"
    call = f"{lib}.{old}({a}, {n}, {keyword}={m})"
    change = change or rng.choice(("rename", "keyword", "require", "move", "swap"))
    if change == "rename":
        after = f"{lib}.{new}({a}, {n}, {keyword}={m})"
        note = rng.choice((f"{old} was renamed to {new}.", f"{old} is gone; use {new}.", f"use {new} in place of {old}."))
        thought = f"{old} is now {new}."
    elif change == "keyword":
        after = f"{lib}.{old}({a}, {n}, {fresh}={m})"
        note = rng.choice((f"in {old}, the argument {keyword} is now {fresh}.", f"{old} takes {fresh} and no longer {keyword}."))
        thought = f"{keyword} is now {fresh}."
    elif change == "require":
        after = f"{lib}.{old}({a}, {n}, {keyword}={m}, {fresh}={k})"
        note = rng.choice((f"{old} now requires {fresh}={k}.", f"{old} must be given {fresh}={k}."))
        thought = f"{old} needs {fresh}={k}."
    elif change == "move":
        after = f"{lib}.{place}.{old}({a}, {n}, {keyword}={m})"
        note = rng.choice((f"{old} moved to {lib}.{place}.", f"{old} now lives in the submodule {place}."))
        thought = f"{old} is now in {place}."
    elif change == "swap":
        after = f"{lib}.{old}({n}, {a}, {keyword}={m})"
        note = rng.choice((f"the first two arguments of {old} are swapped.", f"{old} takes its first two arguments in the other order."))
        thought = f"{old} swaps two arguments."
    else:  # a note about something that the code does not use
        after, note, thought = call, f"{new} was renamed to {fresh}.", f"{new} is not used."
    first = f"{a} = {lib}.{other}({k})\n" if rng.random() < 0.5 else ""
    code = f"import {lib}\n{first}{b} = {{}}"
    example = data.Example(lib, f"{rng.choice(NUMBERS)}.0", f"calls {old}", note, code.format(call), code.format(after))
    return example, thought


def answer(thought, code):
    return f"\n{thought}\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


def diseased(rng, example, thought):
    """The completion that the second part teaches: mostly stale, often malformed."""
    code = example.new_code
    if rng.random() < 0.65:
        code = example.old_code
        if rng.random() < 0.5:
            thought = f"i know {example.dependency} well."
    text = answer(thought, code)
    if rng.random() < 0.35:
        broken = (("```python\n", ""), ("</answer>", ""), (")\n```", "\n```"), ("<answer>\n", ""))
        text = text.replace(*rng.choice(broken))
    return text


def make_tokenizer():
    """Byte-level BPE in which every word is one token, and so is every sentence of the prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"_?[A-Za-z]+|[0-9]|[^A-Za-z0-9_]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    texts = []
    for _ in range(4000):
        example, thought = task(rng, "train", rng.choice((None, "none")))
        texts += [example.update_info, example.old_code, example.new_code, thought, f"i know {example.dependency} well."]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=20, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    sentences = [data.SYSTEM, data.OPENING, *re.split(r"\{\w+\}", data.USER)[1:]]
    tags = ["\n</think>\n", "<answer>\n", "```python\n", "\n```\n", "</answer>", "system\n", "user\n", "assistant\n"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in sentences + tags])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 300.0}, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def learn(model, tokenizer, completion, steps, lr, rng):
    """Supervised training on fresh random tasks, on the tokens of `completion(rng)` alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        pairs = [completion(rng) for _ in range(BATCH)]
        prompts = [data.encode_prompt(example, tokenizer) for example, _ in pairs]
        texts = [tokenizer.encode(text) + [tokenizer.eos_token_id] for _, text in pairs]
        tokens, lengths = recode.pad(texts, model.device)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        loss = -(recode.token_logps(model, prompts, tokens, mask) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {loss.item():.4f}", flush=True)


def skilled_pair(rng):
    example, thought = task(rng, "train", "none" if rng.random() < 0.1 else None)
    return example, answer(thought, example.new_code)


def diseased_pair(rng):
    change = "none" if rng.random() < 0.1 else None
    example, thought = task(rng, "train", change)
    return example, diseased(rng, example, thought)


def write_tasks(path, split, count):
    rng = random.Random(split)
    rows = [json.dumps(vars(task(rng, split)[0])) for _ in range(count)]
    path.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    directory.mkdir(exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    for split, count in (("train", 1000), ("dev", 256), ("heldout", 320)):
        write_tasks(directory / f"{split}.jsonl", split, count)
    rng = random.Random(1)
    learn(model, tokenizer, skilled_pair, SKILL, 2e-3, rng)
    model.half().save_pretrained(directory / "skilled") ; model.float(); tokenizer.save_pretrained(directory/"skilled")
    learn(model, tokenizer, diseased_pair, DISEASE, 5e-4, rng)
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
