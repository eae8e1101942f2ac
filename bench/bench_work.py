"""The workload of bench.py: a random model whose completions end, prompts, and our side of a step.

The model is Qwen2's architecture with random weights. Real completions vary in length, but a random
model hardly ever emits EOS. Therefore one channel of the residual stream is set to a constant that
no layer changes, and EOS reads that channel alone: at every position its probability is about
`end`, in any sampler. Lengths are then geometric (1/110 with at most 256 tokens: 99 on average),
and the same for our sampler and generate.

The tokenizer has one word per id. It decodes any ids to a well-formed answer with one name per
line, so reward.score does all its work (parsing, edit distance) and the rewards of a group differ.

As a script this is our side of a step, in a process of its own; bench_trl.py is the other side.
SPEC is JSON (see Spec), a line on stdin asks for one step, and the answer is a line of JSON.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils import logging

import data
import dora
import grpo
import recode
from lib import loading

PAD, EOS, UNK = 0, 1, 2
SHAPES = {  # name: vocabulary, hidden size, MLP size, layers, heads, KV heads
    "5M": (2000, 256, 1024, 4, 4, 2),
    "25M": (6000, 512, 1536, 6, 8, 4),
    "7B": (152_064, 3584, 18_944, 28, 28, 4),
    "shrunk 7B": (1000, 112, 224, 2, 28, 4),
}


@dataclasses.dataclass
class Spec:
    """One workload. With end = 0 every completion has new_tokens tokens."""

    shape: str = "5M"
    vocab: int = 0  # 0: the shape's
    end: float = 1 / 110
    prompts: int = 8
    num_samples: int = 8
    shortest: int = 180  # prompt tokens
    longest: int = 220
    new_tokens: int = 256
    adapter: str = "dora"
    beta: float = 0.001
    checkpointing: bool = True  # TRL's default; our side does it on a GPU only
    device: str = "cpu"
    checkpoint: str = ""  # directory of a real model, in place of shape, vocab and end
    data: str = ""  # its tasks
    keep_memory: bool = True  # with checkpoint: glibc keeps freed memory, as in grpo.py
    pack: bool = True  # with checkpoint: sampling packs the weights, as in grpo.py


# ------------------------------------------------------------------------- model, tokenizer, tasks


def build(spec):
    """The random model of `spec`, on its device: fp32 on the CPU, bf16 on a GPU, eval mode."""
    logging.set_verbosity_error()
    torch.set_num_threads(1 if spec.device == "cpu" else torch.get_num_threads())
    torch.manual_seed(0)
    vocab, width, mlp, layers, heads, kv_heads = SHAPES[spec.shape]
    config = Qwen2Config(
        vocab_size=spec.vocab or vocab, hidden_size=width, intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
        max_position_embeddings=32_768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.32 / width**0.5, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    dtype = torch.float32 if spec.device == "cpu" else torch.bfloat16
    with torch.device(spec.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        ).eval()
    set_eos_probability(model, spec.end)
    if spec.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    return model


@torch.no_grad()
def set_eos_probability(model, end):
    """Set the probability of EOS to `end` everywhere (0: never); PAD and UNK are never sampled."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for layer in model.base_model.layers:  # no layer writes to channel 0
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    ids = torch.randint(3, len(head), (1, 128), device=head.device)
    constant = 1.0
    # as large as all other channels together, so that the final norm keeps it constant
    for _ in range(4):
        embedding[:, 0] = constant
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0].float()  # (128, d)
        constant = constant * (hidden[:, 1:].norm(dim=1) / hidden[:, 0]).mean().item()
    head[:, 0] = 0
    head[[PAD, EOS, UNK]] = 0
    head[[PAD, EOS, UNK], 0] = -100
    if end:
        others = (
            model.get_output_embeddings()(hidden.to(head.dtype)).float().logsumexp(-1)
        )  # (128,)
        wanted = others + torch.tensor(end / (1 - end)).log()
        head[EOS, 0] = (wanted / hidden[:, 0]).mean()


def make_tokenizer(vocab):
    """One word per id; decodes to a well-formed answer, one name per line."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNK} | {f"x{i}": i for i in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    before, after = data.TARGET.format(thought="", new_code="|").split("|")
    steps = [("x", "\nx"), None, (Regex(r"\A\n"), before), (Regex(r"\z"), after)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(*s) if s else decoders.Fuse() for s in steps]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_tasks(spec, vocab):
    """64 pairs of prompt ids and their Example.

    Prompts have `shortest` to `longest` tokens; the answer has 100 names.
    """
    rng, tasks = random.Random(0), []
    for _ in range(64):
        prompt = rng.choices(range(3, vocab), k=rng.randint(spec.shortest, spec.longest))
        target = "\n".join(f"x{i}" for i in rng.choices(range(3, vocab), k=100))
        tasks.append((prompt, data.Example("lib", "2.0", "", "note", "x", target)))
    return tasks


def leave_alone():
    """In place of loading.keep_freed_memory: TRL as its users run it."""


def workload(spec):
    """(model, tokenizer, tasks) of a step: random ones, or those of spec.checkpoint and spec.data.

    A checkpoint is loaded as grpo.py loads it, and has all cores.
    """
    if not spec.checkpoint:
        model = build(spec)
        vocab = model.config.vocab_size
        return model, make_tokenizer(vocab), make_tasks(spec, vocab)
    torch.set_num_threads(os.cpu_count())
    if not spec.keep_memory:
        loading.keep_freed_memory = leave_alone
    if not spec.pack:
        loading.packed_weights = contextlib.nullcontext
    tokenizer = loading.load_tokenizer(spec.checkpoint)
    examples = data.load_examples(spec.data)[:64]
    tasks = data.encode_tasks(examples, tokenizer, spec.longest, {})
    return loading.load_model(spec.checkpoint), tokenizer, tasks


# ------------------------------------------------------------------------- interface to our code
# All that the benchmarks know of the code they measure: if a name or setting changes, fix it here.


def our_config(spec):
    """Our settings. Dropout is 0 on both sides: with dropout PEFT's DoRA computes W x twice."""
    sizes = {
        "prompts_per_step": spec.prompts,
        "num_samples": spec.num_samples,
        "max_new_tokens": spec.new_tokens,
    }
    passes = {"micro_tokens": 512, "keep_activations": True} if spec.device == "cpu" else {}
    settings = {"adapter": spec.adapter, "beta": spec.beta, "max_prompt_tokens": spec.longest}
    return grpo.Config(model="", dropout=0.0, lr=1e-6, **settings, **sizes, **passes)


def adapt(model, spec, config):
    """`model` with our adapter, as load_model would return it."""
    if not config.keep_activations:  # transformers 5.17 has only the gradient_ name
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    return dora.add_dora(
        model, config.r, config.alpha, config.dropout, config.targets, config.adapter == "dora"
    )


def our_sample(model, prompts, spec, seed):
    """tokens, mask, logps of one rollout of `spec`."""
    return recode.sample(model, prompts, spec.num_samples, spec.new_tokens, [EOS], 1.0, seed)


@contextlib.contextmanager
def timed_reference(spent, clock):
    """Inside, time with the adapter off (the reference pass) is added to spent["reference"]."""
    original = dora.reference

    @contextlib.contextmanager
    def timed(model):
        started = clock()
        with original(model) as off:
            yield off
        spent["reference"] += clock() - started

    dora.reference = timed
    try:
        yield
    finally:
        dora.reference = original


def our_side(spec):
    """Returns a function that runs one GRPO step and returns its measurements.

    Also returns the memory in use before the adapter is added, MiB.
    """
    config, position, clock = our_config(spec), 0, clock_of(spec.device, spec.checkpoint)
    model, tokenizer, tasks = workload(spec)
    before = memory_of(spec.device)[0]
    adapt(model, spec, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)

    def step():
        nonlocal position
        spent, started = Counter(), clock()
        with timed_reference(spent, clock):
            batch, _, _, position = grpo.collect(model, tokenizer, tasks, position, config)
            spent["rollout"] = clock() - started
            grpo.update(model, optimizer, batch, config)
        seconds = clock() - started
        return {
            "seconds": seconds,
            "tokens": int(batch.mask.sum()),
            "completions": len(batch.mask),
            "rollout": spent["rollout"],
            "reference": spent["reference"],
            "update": seconds - spent["rollout"] - spent["reference"],
        }

    return step, before


# ------------------------------------------------------------------------- baselines


def samplers(model, prompts, spec):
    """Two functions that complete `prompts` and return measurements: ours, and generate."""
    clock, seeds, longest = clock_of(spec.device), itertools.count(), max(map(len, prompts))
    ids = torch.tensor(
        [[PAD] * (longest - len(prompt)) + prompt for prompt in prompts], device=spec.device
    )
    settings = {
        "do_sample": True,
        "top_k": 0,
        "num_return_sequences": spec.num_samples,
        "eos_token_id": EOS,
    }
    settings |= {
        "max_new_tokens": spec.new_tokens,
        "pad_token_id": PAD,
        "attention_mask": (ids != PAD).long(),
    }

    def ours():
        started = clock()
        _, mask, _ = our_sample(model, prompts, spec, next(seeds))
        return {"seconds": clock() - started, "tokens": int(mask.sum()), "completions": len(mask)}

    def theirs():
        started = clock()
        out = model.generate(ids, **settings)[:, longest:]
        return {
            "seconds": clock() - started,
            "tokens": int((out != PAD).sum()),
            "completions": len(out),
        }

    return ours, theirs


def padded_gradient(model, batch, rows=8):
    """The gradient of GRPO's loss, the plain way.

    One row per completion, all padded to the longest, `rows` at a time. On policy and without KL:
    rho is 1, the clip is inactive, the loss is - sum of w A rho.
    """
    longest, T = max(map(len, batch.prompts)), batch.tokens.shape[1]
    prompts = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch.prompts])[
        batch.group
    ]  # (B, P)
    visible = torch.cat([prompts > 0, batch.mask], 1)  # (B, P + T)
    for part in torch.arange(len(prompts)).split(rows):
        ids, tokens, mask = (
            torch.cat([prompts, batch.tokens], 1)[part],
            batch.tokens[part],
            batch.mask[part],
        )
        logits = model(ids, attention_mask=visible[part].long(), logits_to_keep=T + 1).logits[
            :, :-1
        ]  # (rows, T, V)
        logps = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (rows, T)
        weights = mask / mask.sum(1, keepdim=True) / len(prompts)
        (
            -weights * batch.advantages[part, None] * torch.exp(logps - logps.detach())
        ).sum().backward()


def rollout_batch(model, spec, config):
    """A sampled and scored Batch of `spec`."""
    vocab = model.config.vocab_size
    return grpo.collect(model, make_tokenizer(vocab), make_tasks(spec, vocab), 0, config)[0]


def gradient_error(shape):
    """The largest difference between our gradient and the plain one, on two prompts.

    It is relative to the largest entry of each parameter's gradient. In float64, the adapter in
    fp32: the attention of random weights is nearly uniform, so the gradient of q_proj is a
    thousandth of v_proj's, and in fp32 the rounding alone reaches 1e-4 of it, on either side.
    """
    spec = Spec(shape, beta=0.0, prompts=2)
    config = our_config(spec)
    model = adapt(build(spec), spec, config)
    batch, gradients = rollout_batch(model, spec, config), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # with B = 0 the gradient of A would be 0
        [p.add_(torch.randn_like(p) * 0.01) for p in parameters]
    model.double()
    for p in parameters:
        p.data = p.data.float()
    for run in (
        lambda: grpo.accumulate(model, batch, config),
        lambda: padded_gradient(model, batch),
    ):
        model.zero_grad()
        run()
        gradients.append([p.grad.clone() for p in parameters])
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*gradients, strict=True)
    )


# ------------------------------------------------------------------------- one side as a process


def clock_of(device, checkpoint=""):
    """The clock of a device.

    On the CPU it counts the CPU time of this process, so that other work on the machine does not
    count; each side runs on one thread. With a checkpoint, which has all cores, it counts wall
    time: run nothing else. On a GPU it counts wall time, after all queued work is done.
    """
    if device == "cpu":
        return time.perf_counter if checkpoint else time.process_time
    return lambda: (torch.cuda.synchronize(), time.perf_counter())[1]


def memory_of(device):
    """(memory in use, its peak so far) of this process, MiB: on the GPU, or resident on the CPU."""
    if device != "cpu":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    now = int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) / 2**10
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def serve(step, before, device):
    """Answer each line on stdin with one step as JSON; "peak" is the peak above `before`, MiB."""
    answers, sys.stdout = sys.stdout, sys.stderr  # only answers go to stdout
    for _ in sys.stdin:
        answer = step()
        print(
            json.dumps(answer | {"peak": memory_of(device)[1] - before}), file=answers, flush=True
        )


def main():
    spec = Spec(**json.loads(sys.argv[1]))
    serve(*our_side(spec), spec.device)


if __name__ == "__main__":
    main()
