"""What a training script needs before its first step, checked before anything slow.

set_up() checks --output, reads the tasks, loads the model and adds the adapter.
check_policy() refuses a model that recode.py would compute otherwise than transformers does.
"""

import math

import torch

import data
import dora
import recode
from lib import fsdp, parallel
from lib.config import BadInput, first_line, open_policy
from lib.loading import load_model, load_tokenizer
from training.memory import keep_activations
from training.run import RunDirectory, check_output

FULL = "full_attention"  # transformers' name of a layer without a window


@torch.no_grad()
def check_policy(model, tokenizer, name):
    """Raise BadInput unless our log-probabilities are those of the model's own forward pass."""
    count = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > count:
        text = f"has {count:,} embeddings, but its tokenizer has {len(tokenizer):,} tokens"
        raise BadInput(f"model: {name!r} {text}")
    kind = model.config.model_type
    windows = [each for each in getattr(model.config, "layer_types", None) or [] if each != FULL]
    if windows or getattr(model.config, "sliding_window", None):
        raise BadInput(f"model: {kind} with a sliding window is not supported")
    half = min(32, exact_length(model.config) // 2)
    ids = torch.arange(5, 5 + 2 * half, device=model.device)[None] % count  # (1, 64)
    tokens = ids[:, half:]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    try:
        ours = recode.token_logps(model, [ids[0, :half].tolist()], tokens, mask)
    except RuntimeError as error:  # its layers do more than call the attention function
        if parallel.out_of_memory(error):
            raise
        why = f"has an attention that cannot be replaced ({first_line(error)}); not supported"
        raise BadInput(f"model: {kind} {why}")
    logits = model(ids, use_cache=False).logits[:, half - 1 : -1].float()
    theirs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    error = (ours - theirs).abs().mean().item()  # nats; bf16 kernels differ by up to 0.1
    if not error <= (0.3 if model.dtype == torch.bfloat16 else 0.01):
        text = f"log-probabilities differ from its own by {error:.2f} nats; not supported"
        raise BadInput(f"model: {kind}: {text}")


def exact_length(config):
    """The number of tokens up to which sampling and training compute the same; inf for most models.

    Learned positions end. RoPE of two kinds depends on the length beyond its original context, so
    a token would have other keys in sampling, where the length grows, than in training.
    """
    context = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get(FULL, rope)  # some models have one for each type of layer
    kind = rope.get("rope_type", "none")
    if kind == "longrope":
        return rope["original_max_position_embeddings"]
    return context if kind == "none" or "dynamic" in kind else math.inf


def check_context(model, prompts, config):
    """Refuse lengths beyond exact_length(); warn where RoPE goes beyond its context."""
    longest = max(map(len, prompts)) + config.max_new_tokens
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    exact = exact_length(model.config)
    text = f"up to {longest:,} tokens with the completion; the context is {min(context, exact):,}"
    if longest > exact:
        raise BadInput(f"--max-new-tokens: {text}; give less, or drop long prompts")
    if longest > context:
        print(f"warning   {text}")


def set_up(config):
    """(run, model, tokenizer, train tasks, held-out tasks); a task is (prompt ids, Example).

    Checks all that can be checked before anything slow, and prints the header.
    """
    parallel.start()
    check_output(config)
    base, adapter, _ = open_policy(config.model)
    tokenizer = load_tokenizer(base)
    train, heldout = load_tasks(tokenizer, config)
    if tokenizer.chat_template is None:
        print("warning   the tokenizer has no chat template; prompts are plain text")
    more = f", over {base}" if adapter else ""
    print(f"model     {config.model}{more}", flush=True)
    model = load_model(base, config.dtype)
    check_policy(model, tokenizer, base)
    check_context(model, [prompt for prompt, _ in train + heldout], config)
    make_trainable(model, config, adapter)
    if not keep_activations(model, tokenizer, train, config):
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.adapter == "none":
        fsdp.shard(model)
    if parallel.WORLD > 1:
        print(f"ranks     {parallel.WORLD}, each with its share of the prompts")
    size = f"{config.prompts_per_step} x {config.num_samples}"
    print(f"run       {config.output}: {config.steps:,} steps of {size} completions")
    return RunDirectory(config, model, tokenizer), model, tokenizer, train, heldout


def load_examples(source):
    """The usable examples of `source`. Prints how many rows are dropped, why and where."""
    dropped = {}
    examples = data.load_examples(source, dropped)
    total = sum(map(len, dropped.values()))
    print(f"data      {source}: {len(examples):,} usable rows, {total:,} dropped")
    for reason, places in dropped.items():
        lines = ", ".join(place.rpartition(" ")[2] for place in places[:5])
        more = ", ..." if len(places) > 5 else ""
        print(f"          {len(places):,} dropped: {reason} (line {lines}{more})")
    return examples


def load_tasks(tokenizer, config):
    """(train tasks, held-out tasks). Prints header lines."""
    most = config.max_prompt_tokens
    train, heldout = data.split_heldout(config.heldout, load_examples(config.data), config.seed)
    tasks = data.encode_tasks(train, tokenizer, most)
    if heldout:
        heldout = data.encode_tasks(heldout, tokenizer, most)
    if len(tasks) < len(train):
        print(f"          {len(train) - len(tasks):,} dropped: prompt over {most:,} tokens")
    source = f" of {config.heldout}" if heldout else "; --heldout sets some aside"
    print(f"tasks     {len(tasks):,} kept, {len(heldout):,} held out{source}")
    return tasks, heldout


def make_trainable(model, config, adapter):
    """Add an adapter to `model`, or load one, or leave all weights trained. Prints header lines."""
    torch.manual_seed(config.seed)
    what = f"{config.adapter}, r {config.r}, on {config.targets}"
    if adapter:
        dora.load_adapter(model, adapter, config.dropout)
    elif config.adapter == "none":
        what = "all weights, in fp32"
    else:
        magnitude = config.adapter == "dora"
        dora.add_dora(model, config.r, config.alpha, config.dropout, config.targets, magnitude)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"          {total - trained:,} parameters frozen, {model.dtype} on {model.device}")
    print(f"          {trained:,} trained: {what}")


def make_optimizer(model, config):
    """AdamW on what is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
