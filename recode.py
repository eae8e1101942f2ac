"""The policy: sampling completions, and the log-probabilities of what was sampled.

Both make the same two passes. The first (prefill) runs a prompt without its last token and keeps
its keys and values. The second runs the completions of its group, which attend to what was kept:

    prompt       p1 p2 p3 p4
    pass 1       p1 p2 p3                              once per group
    pass 2                p4 o1 o2 o3 ... o(n-1)       per completion, from the prompt's last token
    predicts              o1 o2 o3 o4 ... on

Sampling takes pass 2 token by token (Decoder), scoring all at once (token_logps). In training the
gradient comes back in two stages: micro-batch by micro-batch down to the prompts' keys and values,
then once through the prompts themselves (shared_prompts).

transformers lets us replace the attention function; everything else is the model's own code. It
must be full softmax attention: no sliding window, no soft cap.
"""

import contextlib
import dataclasses
import math
import sys
import time
from statistics import fmean as mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import data
import reward
from training import parallel
from training.config import BadInput
from training.loading import eos_ids

# ------------------------------------------------------------------------- 1. shared prompts


def attention(module, query, key, value, mask, attend=None, **kwargs):
    """What a model's layers call: `attend` where forward() passes one, else SDPA as before."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return attend(module, query, key, value, mask, **kwargs), None


AttentionInterface.register("shared_prompt", attention)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


def forward(model, ids, positions, mask, attend):
    """Hidden states (B, T, d) for ids and positions (B, T), with `attend` as attention."""
    if model.config._attn_implementation != "shared_prompt":
        model.set_attn_implementation("shared_prompt")
    out = model.base_model(
        ids, position_ids=positions, attention_mask=mask, use_cache=False, attend=attend
    )
    return out.last_hidden_state


def pad(rows, device):
    """Lists of ids as a tensor (rows, longest), padded on the right with 0; lengths (rows,)."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
    return ids.to(device), lengths.to(device)


class Prompts:
    """P prompts after prefill: keys and values {layer: (P, heads, L, dim)}, last tokens (P,).

    L is the longest prompt without its last token; `visible` (P, L) is false on padding.
    """

    def __init__(self, model, prompts):
        self.keys = {}
        self.values = {}
        device = model.device
        ids, _ = pad([prompt[:-1] or [0] for prompt in prompts], device)  # (P, L), L at least 1
        self.lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)  # (P,)
        self.last = torch.tensor([prompt[-1] for prompt in prompts], device=device)  # (P,)
        columns = torch.arange(ids.shape[1], device=device)
        self.visible = columns < self.lengths[:, None]  # (P, L)
        causal = (columns <= columns[:, None])[None, None]  # (1, 1, L, L), padding is on the right
        forward(model, ids, columns[None], causal, self.store_kv)
        if len(self.keys) != model.config.num_hidden_layers:
            kind = model.config.model_type
            raise BadInput(f"model: {kind} has an attention that cannot be replaced; not supported")

    def store_kv(self, module, query, key, value, mask, **kwargs):
        self.keys[module.layer_idx] = key
        self.values[module.layer_idx] = value
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]


@contextlib.contextmanager
def shared_prompts(model, prompts):
    """Prompts whose gradient waits.

    A backward pass inside ends at their keys and values; what accumulates there goes through the
    prompts once, on exit.
    """
    shared = Prompts(model, prompts)
    outputs = []  # of the prompts' graph
    leaves = []  # what the micro-batches see in their place
    for store in (shared.keys, shared.values):
        for layer, x in store.items():
            store[layer] = x.detach().requires_grad_(x.requires_grad)
            outputs.append(x)
            leaves.append(store[layer])
    yield shared
    used = [(x, leaf.grad) for x, leaf in zip(outputs, leaves) if leaf.grad is not None]
    if used:
        torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])


# ------------------------------------------------------------------------- 2. sampling


def capture(step):
    """step() as a CUDA graph: a function that replays it, and the tensor that it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


def on_gpu(model):
    return model.device.type == "cuda"


class Decoder:
    """Decodes the completions of P prompts, one token for all rows per step.

    A prompt's keys are never copied to its rows: the queries of a group stand side by side as if
    they were one sequence. The completions' KV cache has `width` columns, filled from the left.
    Everything that a step reads keeps its address, so on a GPU it is captured once as a CUDA graph
    and replayed until rows are dropped or the cache grows. The first step of every graph is
    checked against the same step run eagerly; if they differ, graphs are given up.
    """

    graphs = True  # until one has failed

    def __init__(self, model, prompts, num_samples):
        self.model = model
        self.prompts = prompts
        self.num_samples = num_samples
        self.block = 256 if on_gpu(model) else 64  # columns to grow by; each width is a new graph
        self.rows = torch.arange(len(prompts.last) * num_samples, device=model.device)  # (B,) alive
        self.shared = []
        self.keys = []
        self.values = []
        for key, value in zip(prompts.keys.values(), prompts.values.values()):
            self.shared.append((key.contiguous(), value.contiguous()))
            empty = key.new_zeros(len(self.rows), key.shape[1], 0, key.shape[3])
            self.keys.append(empty)
            self.values.append(empty)
        self.t = torch.zeros(1, dtype=torch.long, device=model.device)  # tokens so far
        self.tokens = prompts.last.repeat_interleave(num_samples)  # (B,)
        self.replay = None
        self.logits = None

    def drop_finished(self, alive):
        """Keep only the rows where `alive`, (B,) bool."""
        self.rows = self.rows[alive]
        self.tokens = self.tokens[alive]
        self.keys = [k[alive] for k in self.keys]
        self.values = [v[alive] for v in self.values]
        self.replay = None

    def logits_at(self, t):
        """The logits (B, V) of token t, valid until the next call."""
        self.t.fill_(t)
        if t == self.keys[0].shape[2]:
            self.keys = [F.pad(k, (0, 0, 0, self.block)) for k in self.keys]
            self.values = [F.pad(v, (0, 0, 0, self.block)) for v in self.values]
            self.replay = None
        if self.replay:
            self.replay()
            return self.logits
        logits = self.step()
        if Decoder.graphs and on_gpu(self.model):
            self.capture_and_check(logits)
        return logits

    def step(self):
        """The logits (B, V) after self.tokens, which are token self.t of their rows."""
        group = self.rows // self.num_samples
        columns = torch.arange(self.keys[0].shape[2], device=self.t.device)
        later = (columns > self.t).expand(len(group), -1)  # (B, width)
        masked = torch.cat([~self.prompts.visible[group], later], 1)[:, None, None]
        positions = self.prompts.lengths[group] + self.t  # (B,)
        ids = self.tokens[:, None]
        last = forward(self.model, ids, positions[:, None], masked, self.attend)[:, 0]  # (B, d)
        return self.model.get_output_embeddings()(last)  # (B, V)

    def attend(self, module, query, key, value, masked, scaling, **_):
        """Attention to prompt and completion; query (B, heads, 1, dim), masked (B, 1, 1, L + W)."""
        keys, values = self.keys[module.layer_idx], self.values[module.layer_idx]  # (B, H, W, dim)
        keys.index_copy_(2, self.t, key)
        values.index_copy_(2, self.t, value)
        shared_keys, shared_values = self.shared[module.layer_idx]  # (P, H, L, dim)
        B, H, L = len(keys), keys.shape[1], shared_keys.shape[2]
        query = query.view(B, H, -1, query.shape[-1]) * scaling  # (B, H, R, dim), R heads per key
        scores = torch.cat([self.each(query, shared_keys.mT), query @ keys.mT], -1)
        scores = scores.masked_fill_(masked, -torch.inf)  # (B, H, R, L + W)
        probs = scores.softmax(-1, torch.float32).to(values.dtype)
        mixed = self.each(probs[..., :L], shared_values) + probs[..., L:] @ values
        return mixed.reshape(B, 1, -1, mixed.shape[-1])  # (B, 1, heads, dim)

    def each(self, x, shared):
        """x (B, H, R, n) @ shared (P, H, n, m), each row with its prompt's: (B, H, R, m)."""
        P, (B, H, R, n), m = len(shared), x.shape, shared.shape[-1]
        if B < P * self.num_samples:  # dropped rows take part with zeros
            x = x.new_zeros(P * self.num_samples, H, R, n).index_copy(0, self.rows, x)
        x = x.view(P, self.num_samples, H, R, n).transpose(1, 2).reshape(P, H, -1, n)
        x = (x @ shared).view(P, H, self.num_samples, R, m).transpose(1, 2).reshape(-1, H, R, m)
        return x if B == len(x) else x[self.rows]

    def capture_and_check(self, expected):
        """Capture the step as a graph that must reproduce the `expected` logits."""
        try:
            with parallel.unhooked(self.model):
                self.replay, self.logits = capture(self.step)
            self.replay()
            found = self.logits.float().nan_to_num()
            expected = expected.float().nan_to_num()
            same = (found - expected).norm() <= 0.05 * expected.norm()  # bf16 kernels: 0.02
            problem = None if same else "a CUDA graph gave other logits"
        except RuntimeError as error:
            problem = f"no CUDA graph: {str(error).splitlines()[0]}"
        if problem:
            Decoder.graphs = False
            self.replay = None
            effect = "decoding goes on without graphs, several times slower"
            print(f"warning   {problem}; {effect}", file=sys.stderr)


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
        target = noise.double() * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0]


def draw_noise(seeds, num_samples, max_new_tokens):
    """Uniform numbers in [0, 1), (rows, max_new_tokens); every prompt has its own generator."""
    noise = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.rand(max_new_tokens, num_samples, generator=generator))
    return torch.cat(noise, 1).T


@torch.no_grad()
def sample(model, prompts, num_samples, max_new_tokens, eos, temperature=1.0, seed=0, top_p=1.0):
    """Sample `num_samples` completions of each prompt.

    prompts: list of P lists of ids, of any lengths. eos: list of ids that end a completion. seed:
    an int, or a list of P ints; prompt i's random numbers depend only on its own seed (seed + i
    for an int), not on the other prompts.
    Returns tokens (B, T) int64, mask (B, T) bool and logps (B, T) fp32 with B = P * num_samples
    and T the longest completion. Row i * num_samples + j is completion j of prompt i. The mask
    covers a completion and its EOS; one that is cut at max_new_tokens has none. Outside the mask
    all is 0. Temperature 0 is greedy and equals transformers' generate token for token. Training
    never uses top_p: it would score under a different distribution than it sampled from.
    """
    model.eval()
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    noise = draw_noise(seeds, num_samples, max_new_tokens).to(model.device)  # (B, max_new_tokens)
    decoder = Decoder(model, Prompts(model, prompts), num_samples)
    tokens = torch.zeros(noise.shape, dtype=torch.long, device=model.device)  # (B, T)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logps = torch.zeros_like(tokens, dtype=torch.float)
    eos = torch.tensor(eos, device=model.device)
    worth = 0.5 if on_gpu(model) else 0.8  # dropping costs a new graph, or a copy of the cache
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
        if left == 0:
            break
        if left <= worth * len(rows):
            decoder.drop_finished(alive)
            alive = alive[alive]
    return [(x * mask)[:, : t + 1] for x in (tokens, mask, logps)]


# ------------------------------------------------------------------------- 3. log-probabilities

MAX_LOGITS = 9_000_000  # at once: 36 MB in fp32; glibc would not give back less than 32 MiB
MAX_LOGITS_GPU = 16 * MAX_LOGITS  # else the output layer is read more often than it is used


def logps_of(hidden, targets, head, temperature):
    """log softmax of the target tokens (N,), from hidden states (N, d)."""
    logits = head(hidden).float() / temperature  # (N, V)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def token_logps(model, prompts, tokens, mask, temperature=1.0, group=None):
    """log pi(token t of row b | its prompt and the tokens before), (B, T) fp32, 0 outside the mask.

    prompts: list of B lists of ids; or, with group (B,) int64, of P lists or Prompts, where
    group[b] is the prompt of row b. tokens (B, T) int64; mask (B, T) bool, true on the first
    tokens of a row. Differentiable. The output layer runs on completion positions only, in chunks
    that are recomputed in the backward pass, so the (B, T, V) logits never exist.
    """
    if not isinstance(prompts, Prompts):
        prompts = Prompts(model, prompts)
    if group is None:
        group = torch.arange(len(tokens), device=tokens.device)
    T = int(mask.sum(1).max())
    mask_T = mask[:, :T]
    ids = torch.cat([prompts.last[group][:, None], tokens[:, : T - 1]], 1)  # (B, T)
    ids = ids.masked_fill(~mask_T, 0)
    t = torch.arange(T, device=ids.device)
    before = prompts.visible[group][:, None, None].expand(-1, 1, T, -1)  # (B, 1, T, L)
    causal = (t <= t[:, None]).expand(len(ids), 1, T, T)
    attended = torch.cat([before, causal], -1)  # (B, 1, T, L + T)

    def attend(module, query, key, value, mask, **kwargs):
        key = torch.cat([prompts.keys[module.layer_idx][group], key], 2)  # (B, heads, L + T, dim)
        value = torch.cat([prompts.values[module.layer_idx][group], value], 2)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]

    positions = prompts.lengths[group][:, None] + t  # (B, T)
    hidden = forward(model, ids, positions, attended, attend)[mask_T]  # (N, d)
    head = model.get_output_embeddings()
    budget = MAX_LOGITS_GPU if on_gpu(model) else MAX_LOGITS
    parts = max(1, len(hidden) * head.weight.shape[0] // budget)
    chunks = []
    for h, y in zip(hidden.tensor_split(parts), tokens[mask].tensor_split(parts), strict=True):
        recompute = {"use_reentrant": False, "preserve_rng_state": False}
        chunks.append(checkpoint(logps_of, h, y, head, temperature, **recompute))
    logps = torch.zeros(mask.shape, device=mask.device)
    return logps.masked_scatter(mask, torch.cat(chunks))  # (B, T)


@dataclasses.dataclass
class Batch:
    """B completions of P prompts with all that an update needs; tensors are (B, T) or (B,)."""

    prompts: list
    group: torch.Tensor  # the prompt of each row
    tokens: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    rows: torch.Tensor | None = None  # of a micro-batch: its rows in the whole batch

    def select(self, rows):
        """The batch of `rows` only, an index tensor, in that order, with the prompts they need."""
        chosen = {name: x[rows] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        used, chosen["group"] = self.group[rows].unique(return_inverse=True)
        prompts = [self.prompts[i] for i in used.tolist()]
        return dataclasses.replace(self, prompts=prompts, **chosen)

    def between(self, start, end):
        """The batch of prompts start, ..., end - 1."""
        return self.select(((self.group >= start) & (self.group < end)).nonzero()[:, 0])

    def split(self, size):
        """Batches of `size` prompts each; the last one may have fewer."""
        starts = range(0, len(self.prompts), size)
        return [self.between(start, start + size) for start in starts]


def make_batch(groups, advantages, device):
    """The Batch of all completions of some Groups; advantages (groups, num_samples)."""
    tokens, lengths = pad([ids for group in groups for ids in group.completions], device)  # (B, T)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]  # (B, T)
    group = torch.arange(len(groups), device=device)
    group = group.repeat_interleave(advantages.shape[1])  # (B,)
    advantages = advantages.flatten().to(device)  # (B,)
    return Batch([each.prompt for each in groups], group, tokens, mask, advantages)


def split_by_budget(lengths, budget):
    """Split a list of lengths into [start, end) of one item, or count * longest <= budget."""
    start = 0
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and (i + 1 - start) * longest > budget:
            yield start, i
            start = i
            longest = length
    if lengths:
        yield start, len(lengths)


def micro_batches(model, batch, config):
    """Yield this rank's rows of a Batch as (part, its log-probabilities (B, T)), longest first.

    A rank takes every WORLD-th prompt. Call backward() before the next part: the shared prompts'
    own backward runs inside this iterator, after their last rows. No pass has more than
    config.micro_tokens tokens, padding included, unless one row alone does.
    """
    parallel.gather_weights(model)
    mine = (batch.group % parallel.WORLD == parallel.RANK).nonzero()[:, 0]
    rows = torch.arange(len(batch.mask), device=batch.mask.device)
    batch = dataclasses.replace(batch, rows=rows).select(mine)
    sizes = [len(prompt) for prompt in batch.prompts]
    for start, end in split_by_budget(sizes, config.micro_tokens):
        some = batch.between(start, end)
        lengths, order = some.mask.sum(1).sort(descending=True, stable=True)
        with shared_prompts(model, some.prompts) as prompts:
            for first, last in split_by_budget(lengths.tolist(), config.micro_tokens):
                rows = order[first:last]
                part = some.select(rows)
                group = some.group[rows]
                temperature = config.temperature
                yield part, token_logps(model, prompts, part.tokens, part.mask, temperature, group)


@torch.no_grad()
def batch_logps(model, batch, config):
    """The log-probabilities of a Batch without gradient or dropout, (B, T), on every rank."""
    model.eval()
    logps = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for part, found in micro_batches(model, batch, config):
        logps[part.rows] = found
    return parallel.sum_ranks(logps)


# ------------------------------------------------------------------------- 4. groups and rewards


class Answer(NamedTuple):
    """One sampled completion."""

    ids: list  # token ids, with the EOS
    text: str  # without the EOS
    cut: bool  # whether it was cut at max_new_tokens
    logp: float  # log-probability of the completion


def sample_answers(
    model, tokenizer, prompts, num_samples, max_new_tokens, temperature=1.0, seed=0, top_p=1.0
):
    """sample() as a list of Answers; answer j of prompt i has index i * num_samples + j."""
    eos = eos_ids(model, tokenizer)
    tokens, mask, logps = sample(
        model, prompts, num_samples, max_new_tokens, eos, temperature, seed, top_p
    )
    answers = []
    for row, kept, logp in zip(tokens.cpu(), mask.cpu(), logps.sum(1).tolist(), strict=True):
        ids = row[kept].tolist()
        plain = [i for i in ids if i not in eos]
        text = tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        answers.append(Answer(ids, text, ids[-1] not in eos, logp))
    return answers


@dataclasses.dataclass
class Group:
    """One task and its completions, lists of ids with their EOS; the rest if they were sampled."""

    prompt: list
    example: data.Example
    completions: list
    texts: list = ()
    rewards: list = ()
    cut: list = ()  # whether a completion was cut at max_new_tokens
    grades: list = ()
    seconds: float = 0.0  # that scoring took


def score_group(prompt, example, answers, correctness):
    """The Group of one task's answers, graded and rewarded."""
    started = time.perf_counter()
    grades = [reward.grade(answer.text, example) for answer in answers]
    rewards = [reward.total(grade, example, correctness) for grade in grades]
    completions, texts, cut, _ = zip(*answers)
    seconds = time.perf_counter() - started
    return Group(prompt, example, completions, texts, rewards, cut, grades, seconds)


def sample_groups(model, tokenizer, tasks, config, position):
    """Sample and score config.num_samples completions of every task: a list of Groups.

    Every rank samples its share. Task i of the stream uses a seed of its own, so any rank may
    sample it.
    """
    parallel.gather_weights(model)
    first = config.seed * 1_000_003 + position  # a prime keeps (seed, position) apart
    mine = parallel.share(tasks)
    seeds = parallel.share(range(first, first + len(tasks)))
    answers = []
    if mine:  # there may be fewer tasks than ranks
        prompts = [prompt for prompt, _ in mine]
        n, longest = config.num_samples, config.max_new_tokens
        answers = sample_answers(
            model, tokenizer, prompts, n, longest, config.temperature, seeds
        )
    groups = []
    for i, (prompt, example) in enumerate(mine):  # groups by position, never by content
        some = answers[i * config.num_samples : (i + 1) * config.num_samples]
        groups.append(score_group(prompt, example, some, config.correctness))
    if not all(math.isfinite(answer.logp) for answer in answers):
        for group in groups:  # the weights have overflowed: rewards of NaN stop the run
            group.rewards = [math.nan] * config.num_samples
    return parallel.gather(groups)


def summarize(groups):
    """Means over all answers: format (a share), es, em, stale (each in [0, 1]) and reward."""
    grades = [grade for group in groups for grade in group.grades]
    return {
        "format": mean(grade.format > 0 for grade in grades),
        "es": mean(grade.es for grade in grades),
        "em": mean(grade.em for grade in grades),
        "stale": mean(grade.stale for grade in grades),
        "reward": mean(value for group in groups for value in group.rewards),
    }


def describe(groups):
    """The metrics of a rollout: those of summarize(), spread within groups, lengths; floats."""
    metrics = summarize(groups)
    lengths = [len(ids) for group in groups for ids in group.completions]
    metrics["reward_std"] = mean(torch.tensor(group.rewards).std().item() for group in groups)
    metrics["no_spread"] = mean(max(group.rewards) == min(group.rewards) for group in groups)
    metrics["completion_length"] = mean(lengths)
    metrics["truncated"] = mean(cut for group in groups for cut in group.cut)
    metrics["seconds_score"] = sum(group.seconds for group in groups)
    return metrics
