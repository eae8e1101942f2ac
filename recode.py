"""The policy: sampling completions, and the log-probabilities of what was sampled.

Both make the same two passes. Prefill runs a prompt without its last token and keeps its keys and
values. The second pass runs the completions of its group, which attend to what was kept:

    prompt       p1 p2 p3 p4
    prefill      p1 p2 p3                              once per group
    pass 2                p4 o1 o2 o3 ... o(n-1)       per completion, from the prompt's last token
    predicts              o1 o2 o3 o4 ... on

Sampling takes pass 2 token by token (Decoder), scoring all at once (completion_logps). In training
the gradient comes back in two stages: micro-batch by micro-batch down to the prompt's keys and
values, then once through the prompt itself (shared_prompt).

transformers lets us replace the attention function; everything else is the model's own code. It
must be full softmax attention: no sliding window, no soft cap.
"""

import contextlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib import parallel, speed
from lib.config import BadInput


def attention(module, query, key, value, mask, attend=None, **kwargs):
    """What a model's layers call: `attend` where forward() passes one, else SDPA as before."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return attend(module.layer_idx, query, key, value, kwargs.get("scaling")), None


AttentionInterface.register("shared_prompt", attention)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


def forward(model, ids, positions, attend):
    """Hidden states (B, T, d) of ids (B, T) at positions (B, T).

    attend(layer, query (B, heads, T, dim), key, value, scaling) returns (B, T, heads, dim).
    """
    if model.config._attn_implementation != "shared_prompt":
        model.set_attn_implementation("shared_prompt")
    settings = {"position_ids": positions, "use_cache": False, "attend": attend}
    settings["attention_mask"] = ids[None, None]  # any 4-D tensor: the model builds no mask itself
    return model.base_model(ids, **settings).last_hidden_state


def logit_scale(model):
    """What forward() multiplies the output layer's logits by; Granite divides by logits_scaling."""
    scale = getattr(model.config, "logit_scale", None) or 1  # Cohere
    return scale / getattr(model.config, "logits_scaling", 1)


def prefill(model, prompt):
    """The KV cache of a prompt without its last token: [keys, values, keys, ...], layer by layer.

    Each is (1, heads, L, dim).
    """
    cache = {}
    L = len(prompt) - 1

    def attend(layer, query, key, value, scaling):
        cache[layer] = key[:, :, :L], value[:, :, :L]
        settings = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **settings).transpose(1, 2)

    ids = torch.tensor([prompt[:L] or prompt], device=model.device)  # (1, L), but never empty
    forward(model, ids, torch.arange(ids.shape[1], device=model.device)[None], attend)
    if len(cache) != model.config.num_hidden_layers:
        kind = model.config.model_type
        raise BadInput(f"model: {kind} has an attention that cannot be replaced; not supported")
    return [x for layer in sorted(cache) for x in cache[layer]]


@contextlib.contextmanager
def shared_prompt(model, prompt):
    """Run a prompt once for all of its completions: (its prefill(), its last token).

    Call backward() inside. It ends at the prompt's keys and values; what accumulates there goes
    through the prompt once, on exit.
    """
    outputs = prefill(model, prompt)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in outputs]
    yield leaves, prompt[-1]
    used = [(x, leaf.grad) for x, leaf in zip(outputs, leaves) if leaf.grad is not None]
    if used:
        torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])


class Decoder:
    """Decodes the completions of P prompts, one token for all rows per step.

    The KV cache of a row has the prompt's columns, padded to the longest prompt, then those of the
    completion. Everything that a step reads keeps its address, so on a GPU the step is captured
    once as a CUDA graph and replayed until rows are dropped or the cache grows.
    """

    def __init__(self, model, prompts, num_samples):
        self.model = model
        self.block = 256 if parallel.CUDA else 64  # columns to grow by; each width is a new graph
        device = model.device
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts]).to(device)  # (P,)
        last = torch.tensor([prompt[-1] for prompt in prompts]).to(device)  # (P,)
        self.lengths = lengths.repeat_interleave(num_samples)  # (B,) columns of the prompt
        self.tokens = last.repeat_interleave(num_samples)  # (B,)
        self.rows = torch.arange(len(self.tokens), device=device)  # (B,) not dropped yet
        longest = max(len(prompt) - 1 for prompt in prompts)
        self.first = -(-longest // 8) * 8  # column of the first token; aligned for matrix products
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # tokens so far
        self.cache = []  # keys, values, keys, ..., layer by layer, each (B, H, columns, dim)
        for parts in zip(*[prefill(model, prompt) for prompt in prompts]):
            padded = [F.pad(x, (0, 0, 0, self.first - x.shape[2])) for x in parts]
            self.cache.append(torch.cat(padded).repeat_interleave(num_samples, 0))
        padding = torch.arange(self.first, device=device) >= self.lengths[:, None, None, None]
        self.bias = torch.zeros_like(padding, dtype=model.dtype)  # (B, 1, 1, columns)
        self.bias.masked_fill_(padding, -torch.inf)
        self.graphs = parallel.CUDA  # until one has failed
        self.replay = self.logits = None

    def drop_finished(self, alive):
        """Keep only the rows where `alive`, (B,) bool."""
        kept = alive.nonzero()[:, 0]  # once: a boolean index would synchronise in every layer
        self.rows = self.rows[kept]
        self.tokens = self.tokens[kept]
        self.lengths = self.lengths[kept]
        self.bias = self.bias[kept]
        for i, x in enumerate(self.cache):  # one by one: a second cache would double the peak
            self.cache[i] = x[kept]
        self.replay = None

    def logits_at(self, t):
        """The logits (B, V) of token t, valid until the next call."""
        self.t.fill_(t)
        if self.first + t == self.bias.shape[3]:
            for i, x in enumerate(self.cache):
                self.cache[i] = F.pad(x, (0, 0, 0, self.block))
            self.bias = F.pad(self.bias, (0, self.block), value=-torch.inf)
            self.replay = None
        if self.replay:
            self.replay()
            return self.logits
        logits = self.step()
        if self.graphs:
            self.replay, self.logits = speed.capture_and_check(self.model, self.step, logits)
            self.graphs = self.replay is not None
        return logits

    def step(self):
        """The logits (B, V) after self.tokens, which are token self.t of their rows."""
        self.column = self.first + self.t  # where the new keys and values go
        self.bias.index_fill_(3, self.column, 0.0)
        positions = (self.lengths + self.t)[:, None]  # (B, 1)
        hidden = forward(self.model, self.tokens[:, None], positions, self.attend)  # (B, 1, d)
        logits = self.model.get_output_embeddings()(hidden)[:, 0]  # (B, V)
        scale = logit_scale(self.model)
        return logits if scale == 1 else logits * scale

    def attend(self, layer, query, key, value, scaling):
        keys, values = self.cache[2 * layer : 2 * layer + 2]
        keys.index_copy_(2, self.column, key)
        values.index_copy_(2, self.column, value)
        B, H, _, dim = keys.shape
        query = query.view(B, H, -1, dim)  # the heads that share a key, as if they were a sequence
        out = F.scaled_dot_product_attention(query, keys, values, self.bias, scale=scaling)
        return out.reshape(B, 1, -1, out.shape[-1])  # (B, 1, heads, dim)


def pick(logits, temperature, noise, top_p=1.0):
    """One token per row, (B,), and its log-probability, (B,); argmax at temperature 0.

    noise (B, 1) is uniform in [0, 1): the token is where it falls on the cumulative probabilities.
    With top_p < 1 only the likeliest tokens, whose probabilities sum to top_p, can be picked; the
    log-probability is still that of the full distribution.
    """
    logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logps.argmax(-1, keepdim=True)
    else:
        probs = logps.exp()  # (B, V)
        if top_p < 1:
            rising, order = probs.sort(-1)
            rare = rising.cumsum(-1) <= 1 - top_p  # (B, V), cut where transformers cuts
            rare[:, -1] = False  # the likeliest always stays
            probs = probs.masked_fill(rare.scatter(-1, order, rare), 0)
        cumulative = probs.cumsum(-1, dtype=torch.double)
        tokens = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0]


def draw_noise(seed, count, num_samples, max_new_tokens):
    """Uniform numbers in [0, 1), (count * num_samples, max_new_tokens), a generator per prompt."""
    seeds = range(seed, seed + count) if isinstance(seed, int) else seed
    noise = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.rand(max_new_tokens, num_samples, generator=generator))
    return torch.cat(noise, 1).T


@torch.no_grad()
def sample(
    model, prompts, num_samples, max_new_tokens, eos, temperature=1.0, seed=0, top_p=1.0,
    progress=None,
):  # fmt: skip
    """Sample `num_samples` completions of each prompt.

    prompts: P lists of ids. eos: list of ids that end a completion. seed: P ints, or an int for
    seed + i; prompt i's random numbers depend only on its own seed. Returns tokens (B, T) int64,
    mask (B, T) bool and logps (B, T) fp32; B = P * num_samples, T is the longest completion.
    Completion j of prompt i is row i * num_samples + j. The mask covers a completion and its EOS;
    the rest is 0. Temperature 0 is greedy and equals transformers' generate. Training never uses
    top_p: it scores the full distribution. progress(tokens, finished rows) follows each step.
    """
    model.eval()
    noise = draw_noise(seed, len(prompts), num_samples, max_new_tokens).to(model.device)
    logps = torch.zeros_like(noise)  # (B, T)
    tokens = logps.long()
    mask = logps.bool()
    eos = torch.tensor(eos, device=model.device)
    drop_below = 0.5 if parallel.CUDA else 0.8  # of the rows; a drop costs a graph, or a copy
    with speed.packed_weights(model):
        decoder = Decoder(model, prompts, num_samples)
        alive = torch.ones_like(decoder.rows, dtype=torch.bool)  # rows without an EOS yet
        for t in range(max_new_tokens):
            rows = decoder.rows
            new, new_logps = pick(decoder.logits_at(t), temperature, noise[rows, t, None], top_p)
            tokens[rows, t] = new
            logps[rows, t] = new_logps
            mask[rows, t] = alive
            decoder.tokens.copy_(new)  # in place: a captured graph reads this address
            alive &= ~torch.isin(new, eos)
            left = int(alive.sum())
            if progress:
                progress(t + 1, len(noise) - left)
            if left == 0:
                break
            if left <= drop_below * len(rows):
                decoder.drop_finished(alive)
                alive = alive[alive]
    return [(x * mask)[:, : t + 1] for x in (tokens, mask, logps)]


MAX_LOGITS = 36_000_000  # values per chunk, 144 MB: a CPU's product wants about 256 rows
MAX_LOGITS_GPU = 4 * MAX_LOGITS  # smaller chunks would re-read the output layer too often


def target_logps(hidden, targets, head, temperature):
    """log softmax of the target tokens (N,), from hidden states (N, d)."""
    logits = head(hidden).float() / temperature  # (N, V)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


class FrozenHeadLogps(torch.autograd.Function):
    """target_logps() of an output layer that is not trained, with one product less.

    d logp_i / d hidden_i = sum_v ([v = y_i] - p_iv) W_v / temperature is as small as hidden_i. The
    forward pass keeps it, so the backward pass needs neither the logits nor the output layer.
    """

    @staticmethod
    def forward(ctx, hidden, targets, head, temperature):
        logps = (head(hidden).float() / temperature).log_softmax(-1)  # (N, V)
        chosen = logps.gather(-1, targets[:, None])[:, 0]  # (N,)
        if ctx.needs_input_grad[0]:
            W = head.weight
            p = logps.exp_()  # (N, V), in place: logps is the largest tensor
            # Before the product: W[y] - p W would cancel in bf16 where p of the target is near 1.
            p[torch.arange(len(p), device=p.device), targets] -= 1
            ctx.save_for_backward(-(p.to(W.dtype) @ W) / temperature)
        return chosen

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors  # (N, d)
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def completion_logps(model, prompt, part, temperature):
    """log pi(token t | prompt and the tokens before) of completions of one prompt, (B, T) fp32.

    prompt: what shared_prompt() returns. part: an object with tokens (B, T) int64 and mask (B, T)
    bool, true on the first tokens of a row; the result is 0 outside it. Differentiable. The output
    layer runs in chunks whose logits are not kept for the backward pass, so the (B, T, V) logits
    never exist.
    """
    cache, last = prompt
    tokens, mask = part.tokens, part.mask
    T = int(mask.sum(1).max())
    ids = F.pad(tokens, (1, 0), value=last)[:, :T].masked_fill(~mask[:, :T], 0)  # (B, T)
    L = cache[0].shape[2]
    causal = causal_lower_right(T, L + T)  # padding needs no mask: it comes after all that counts

    def attend(layer, query, key, value, scaling):
        shared_key, shared_value = cache[2 * layer : 2 * layer + 2]  # (1, H, L, dim)
        key = torch.cat([shared_key.expand(len(key), -1, -1, -1), key], 2)  # (B, H, L + T, dim)
        value = torch.cat([shared_value.expand(len(key), -1, -1, -1), value], 2)
        settings = {"attn_mask": causal, "scale": scaling, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **settings).transpose(1, 2)

    positions = torch.arange(L, L + T, device=ids.device).expand(len(ids), -1)  # (B, T)
    hidden = forward(model, ids, positions, attend)[mask[:, :T]]  # (N, d)
    head = model.get_output_embeddings()
    temperature = temperature / logit_scale(model)
    budget = MAX_LOGITS_GPU if parallel.CUDA else MAX_LOGITS
    rows = max(1, budget // head.weight.shape[0])  # per chunk
    chunks = []
    for h, y in zip(hidden.split(rows), tokens[mask].split(rows), strict=True):
        if head.weight.requires_grad:
            recompute = {"use_reentrant": False, "preserve_rng_state": False}
            chunks.append(checkpoint(target_logps, h, y, head, temperature, **recompute))
        else:
            chunks.append(FrozenHeadLogps.apply(h, y, head, temperature))
    logps = torch.zeros(mask.shape, device=mask.device)
    return logps.masked_scatter(mask, torch.cat(chunks))  # (B, T)


def token_logps(model, prompts, tokens, mask, temperature=1.0):
    """completion_logps() of B rows with a prompt each; prompts: list of B lists of ids."""
    rows = []
    for prompt, row, kept in zip(prompts, tokens[:, None], mask[:, None], strict=True):
        shared = prefill(model, prompt), prompt[-1]
        part = SimpleNamespace(tokens=row, mask=kept)
        rows.append(completion_logps(model, shared, part, temperature))
    return torch.cat(rows)  # (B, T)
