"""What a run needs: memory and time by a small formula, and --dry-run, which holds it against a real step.

    python -m tools.plan                             the README's table, for Qwen2.5-Coder
    python grpo.py --model ... --dry-run       the largest step there can be, measured; then exit

The model: W weights, layers n, width d, width f of the MLP, width k of the keys, V words. An adapter of
A weights. b bytes a number in the forward pass: 2 in bf16, 4 in fp32. N GPUs. A GPU samples p prompts of
L tokens and G completions of T tokens for each; it trains in passes of at most M tokens (--micro-tokens):
u tokens of prompts, and r rows, c = r T tokens of completions. In bytes:

    weights    b W                                                                       (eq. 1)
    trained    16 A with an adapter; else 4 W + 12 W / N: the gradient in fp32, and,     (eq. 2)
               in slices or with --offload not at all, weights and AdamW's moments
    sampling   2 b n k p (L + G T) + 16 p G V      keys and values; logits               (eq. 3)
    a layer    a = b ((11 d + 3 f) c + (2 d + 2 k) r (L + T))   what it keeps, and on    (eq. 4)
               its way back w = b (2 d + 3 f) c more
    training   b n (d (u + c) + 4 k u) + a + w     the layers computed anew              (eq. 5)
               b n (11 d + 3 f) u + n a + w        --keep-activations
    peak       weights + trained + max(sampling, training + 16 LOGITS)                   (eq. 6)

And in seconds, with a GPU that moves B bytes/s and does C operations/s (one and a half times the limit
when sampling, two fifths of the peak when training, both goals rather than measurements):

    sample     1.5 T (b W + 2 b n k p (L + G T / 2)) / B                                 (eq. 7)
    update     2 W p (L + G T) s / (0.4 C), with s = 2 sweeps and one more each for      (eq. 8)
               the reference, for layers computed anew, and for the gradient of W
"""

from dataclasses import dataclass

from transformers import Qwen2Config

import recode

HELD_D, HELD_F = 11, 3  # eq. 4, counted in the layers of Qwen2 in bf16, see tests/test_plan.py
BACK_D, BACK_F = 2, 3
GPU = {"name": "H100 80 GB", "bandwidth": 3.35e12, "operations": 989e12}  # bf16, dense; its data sheet's figures
SIZES = {  # Qwen2.5-Coder: width, MLP, layers, heads, heads of keys, words, whether the output layer is the input's
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
}


def qwen(name):
    """The transformers config of a size."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return Qwen2Config(**dict(zip((*names, "vocab_size", "tie_word_embeddings"), SIZES[name], strict=True)))


@dataclass
class Shape:
    """The numbers of a model that the equations use."""

    d: int
    n: int
    f: int
    k: int
    V: int
    W: int
    A: int  # of a DoRA of rank r on q_proj and v_proj

    @classmethod
    def of(cls, config, r=64):
        d, n, f, V = config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.vocab_size
        head = getattr(config, "head_dim", None) or d // config.num_attention_heads
        q, k = head * config.num_attention_heads, head * config.num_key_value_heads
        W = n * (2 * d * q + 2 * d * k + 3 * d * f) + V * d * (1 if config.tie_word_embeddings else 2)
        return cls(d, n, f, k, V, W, n * (r * (2 * d + q + k) + q + k))


def memory(x, config, L, prompts, ranks=1, b=2, logits=recode.MAX_LOGITS):
    """Bytes by part, eq. 1 to 6, for a Shape, a script's Config, prompts of L tokens, `prompts` of them a rank."""
    G, T, M = config.num_samples, config.max_new_tokens, config.micro_tokens
    u = min(prompts * L, max(M, L))
    r = min(prompts * G, max(M // T, 1))
    held = (HELD_D * x.d + HELD_F * x.f) * b
    layer = held * r * T + b * (2 * x.d + 2 * x.k) * r * (L + T)  # eq. 4
    back = (BACK_D * x.d + BACK_F * x.f) * b * r * T
    kept = x.n * (held * u + layer) if config.keep_activations else b * x.n * (x.d * (u + r * T) + 4 * x.k * u) + layer
    full = 4 * x.W + (0 if config.offload else 12 * x.W / ranks)
    parts = {
        "weights": b * x.W,  # eq. 1
        "trained": full if config.adapter == "none" else 16 * x.A,  # eq. 2
        "sampling": 2 * b * x.n * x.k * prompts * (L + G * T) + 16 * prompts * G * x.V,  # eq. 3
        "training": kept + back + 16 * logits,  # eq. 5
    }
    return parts | {"peak": parts["weights"] + parts["trained"] + max(parts["sampling"], parts["training"])}  # eq. 6


def seconds(x, config, L, prompts, b=2):
    """Seconds of the largest step on GPU: of sampling (eq. 7), of the update (eq. 8)."""
    G, T = config.num_samples, config.max_new_tokens
    sample = 1.5 * T * (b * x.W + 2 * b * x.n * x.k * prompts * (L + G * T / 2)) / GPU["bandwidth"]
    sweeps = 2 + bool(config.beta) + (not config.keep_activations) + (config.adapter == "none")
    return sample, 2 * x.W * prompts * (L + G * T) * sweeps / (0.4 * GPU["operations"])


def table(config):
    """Memory and time of every size, adapter and number of GPUs, one prompt a GPU, as markdown."""
    lines = ["| | DoRA, any number of GPUs | full, 1 GPU | full, 2 GPUs | full, 8 GPUs |", "|---|---|---|---|---|"]
    for name in SIZES:
        x, cells = Shape.of(qwen(name), config.r), []
        for adapter, ranks in (("dora", 1), ("none", 1), ("none", 2), ("none", 8)):
            config.adapter, config.beta = adapter, 0.001 if adapter == "dora" else 0.0
            peak = memory(x, config, config.max_prompt_tokens, 1, ranks, logits=recode.MAX_LOGITS_GPU)["peak"]
            step = sum(seconds(x, config, config.max_prompt_tokens, 1))
            cells.append(f"{peak / 1e9:.0f} GB, {step:.1f} s")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import grpo

    print(f"{GPU['name']}; one prompt of 2,048 tokens a GPU, 8 completions of 1,024; peak memory and time of a step\n")
    print(table(grpo.Config(max_prompt_tokens=2048)))
