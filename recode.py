"""The policy: drawing completions from a model, and the log-probabilities of what was drawn.

Both do the same two passes. The first runs a prompt once, all but its last token, and keeps its keys
and values. The second runs the completions of its group, and every one of them looks at what was kept:

    prompt       p1 p2 p3 p4
    pass 1       p1 p2 p3                              once for the group
    pass 2                p4 o1 o2 o3 ... o(n-1)       for every completion o, from the prompt's last token on
    predicts              o1 o2 o3 o4 ... on

When sampling, pass 2 goes token by token (Decoder); when scoring, all at once (token_logps). In training
the gradient comes back in two stages: micro-batch by micro-batch as far as the keys and values of the
prompts, and then, once, through the prompts themselves (shared_prompts).

transformers lets the attention function be exchanged; everything else is the model's own code. It must
be full softmax attention: no sliding window, no soft cap.
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
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import data
import reward
from training import parallel
from training.config import BadInput
from training.loading import eos_ids

# ------------------------------------------------------------------------- 1. a prompt and its completions


def attention(module, query, key, value, mask, attend=None, **kwargs):
    """What the layers of a model call: `attend`, if forward() passes one, else what they called before."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return attend(module, query, key, value, mask, **kwargs), None


AttentionInterface.register("shared_prompt", attention)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


def forward(model, ids, positions, mask, attend):
    """Hidden states (B, T, d) for ids and positions (B, T), with attend(module, query, key, value, mask) inside."""
    if model.config._attn_implementation != "shared_prompt":
        model.set_attn_implementation("shared_prompt")
    out = model.base_model(ids, position_ids=positions, attention_mask=mask, use_cache=False, attend=attend)
    return out.last_hidden_state


def pad(rows, device):
    """Lists of ids, padded on the right with 0 to (rows, longest), and their lengths (rows,)."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
    return ids.to(device), lengths.to(device)


class Prompts:
    """P prompts, run once: the keys and values of all layers, {layer: (P, heads, L, dim)}, and the last tokens.

    L is the longest prompt without its last token; `visible` (P, L) says which columns are no padding.
    """

    def __init__(self, model, prompts):
        self.keys, self.values = {}, {}
        ids, _ = pad([prompt[:-1] or [0] for prompt in prompts], model.device)  # (P, L), at least one column
        self.lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)  # (P,)
        self.last = torch.tensor([prompt[-1] for prompt in prompts], device=model.device)  # (P,)
        columns = torch.arange(ids.shape[1], device=model.device)
        self.visible = columns < self.lengths[:, None]  # (P, L)
        causal = (columns <= columns[:, None])[None, None]  # (1, 1, L, L); padding is right of all that counts
        forward(model, ids, columns[None], causal, self.keep)
        if len(self.keys) != model.config.num_hidden_layers:
            raise BadInput(f"model: {model.config.model_type} does not let its attention be exchanged; not supported")

    def keep(self, module, query, key, value, mask, **kwargs):
        self.keys[module.layer_idx], self.values[module.layer_idx] = key, value
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]


@contextlib.contextmanager
def shared_prompts(model, prompts):
    """Prompts whose gradient waits: backward passes inside end at their keys and values, and what has
    gathered there goes through the prompts once, when the block is left."""
    shared = Prompts(model, prompts)
    kept = [shared.keys, shared.values]
    graph = [x for store in kept for x in store.values()]
    for store in kept:
        store.update({layer: x.detach().requires_grad_(x.requires_grad) for layer, x in store.items()})
    leaves = [x for store in kept for x in store.values()]
    yield shared
    ends = [(x, leaf.grad) for x, leaf in zip(graph, leaves, strict=True) if leaf.grad is not None]
    if ends:
        torch.autograd.backward(*zip(*ends))


# ------------------------------------------------------------------------- 2. sampling


def capture(step):
    """step() as a CUDA graph: a function that runs it again on the same memory, and the tensor it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


def on_gpu(model):
    return model.device.type == "cuda"


class Decoder:
    """The completions of P prompts, a token for all of them at each step.

    The prompts' keys and values are looked at where they are, never copied for a row: the queries of a
    group stand side by side as if they were one sequence. Those of the completions have `width` columns
    that fill up from the left. All that a step reads has a fixed place, so on a GPU it is recorded once
    as a CUDA graph and then repeated, until rows leave or the columns are full. The first step of every
    graph is checked against the same step without one; should they differ, there are no more graphs.
    """

    graphs = True  # until one has failed

    def __init__(self, model, prompts, num_samples):
        self.model, self.prompts, self.num_samples = model, prompts, num_samples
        self.block = 256 if on_gpu(model) else 64  # every new width is a new graph
        self.rows = torch.arange(len(prompts.last) * num_samples, device=model.device)  # (B,) who is left
        self.shared = [(k.contiguous(), v.contiguous()) for k, v in zip(prompts.keys.values(), prompts.values.values())]
        self.keys = [k.new_zeros(len(self.rows), k.shape[1], 0, k.shape[3]) for k, _ in self.shared]
        self.values = [k.clone() for k in self.keys]
        self.t = torch.zeros(1, dtype=torch.long, device=model.device)  # tokens so far
        self.tokens = prompts.last.repeat_interleave(num_samples)  # (B,)
        self.replay, self.logits = None, None

    def keep(self, rows):
        """Go on with some rows of the batch only; rows (B,) bool."""
        self.rows, self.tokens, self.replay = self.rows[rows], self.tokens[rows], None
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]

    def next(self, t):
        """The logits (B, V) of token t, which stay valid until the next call."""
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
            self.record(logits)
        return logits

    def step(self):
        """The logits (B, V) that follow self.tokens, the tokens number self.t of their rows."""
        group = self.rows // self.num_samples
        width = torch.arange(self.keys[0].shape[2], device=self.t.device)
        later = (width > self.t).expand(len(group), -1)  # (B, width)
        hidden = torch.cat([~self.prompts.visible[group], later], 1)[:, None, None]  # (B, 1, 1, L + width)
        positions = self.prompts.lengths[group] + self.t  # (B,)
        last = forward(self.model, self.tokens[:, None], positions[:, None], hidden, self.attend)[:, 0]  # (B, d)
        return self.model.get_output_embeddings()(last)  # (B, V)

    def attend(self, module, query, key, value, hidden, scaling, **_):
        """Softmax over the columns of prompt and completion that are not hidden. query (B, heads, 1, dim)."""
        keys, values = self.keys[module.layer_idx], self.values[module.layer_idx]  # (B, H, width, dim)
        keys.index_copy_(2, self.t, key)
        values.index_copy_(2, self.t, value)
        shared_keys, shared_values = self.shared[module.layer_idx]  # (P, H, L, dim)
        B, H, L = len(keys), keys.shape[1], shared_keys.shape[2]
        query = query.view(B, H, -1, query.shape[-1]) * scaling  # (B, H, R, dim), R heads share one key
        scores = torch.cat([self.each(query, shared_keys.mT), query @ keys.mT], -1)  # (B, H, R, L + width)
        probs = scores.masked_fill_(hidden, -torch.inf).softmax(-1, torch.float32).to(values.dtype)
        mixed = self.each(probs[..., :L], shared_values) + probs[..., L:] @ values  # (B, H, R, dim)
        return mixed.reshape(B, 1, -1, mixed.shape[-1])

    def each(self, x, shared):
        """x (B, H, R, n) @ shared (P, H, n, m), for every row that of its prompt: (B, H, R, m)."""
        P, (B, H, R, n), m = len(shared), x.shape, shared.shape[-1]
        if B < P * self.num_samples:  # rows that have left have nothing to ask
            x = x.new_zeros(P * self.num_samples, H, R, n).index_copy(0, self.rows, x)
        x = x.view(P, self.num_samples, H, R, n).transpose(1, 2).reshape(P, H, -1, n)
        x = (x @ shared).view(P, H, self.num_samples, R, m).transpose(1, 2).reshape(-1, H, R, m)
        return x if B == len(x) else x[self.rows]

    def record(self, expected):
        """Make the step a graph that has to give the `expected` logits for the present token."""
        try:
            with parallel.unhooked(self.model):
                self.replay, self.logits = capture(self.step)
            self.replay()
            found, expected = self.logits.float().nan_to_num(), expected.float().nan_to_num()
            same = (found - expected).norm() <= 0.05 * expected.norm()  # 0.02 between kernels in bf16
            problem = None if same else "a CUDA graph gave other logits"
        except RuntimeError as error:
            problem = f"no CUDA graph: {str(error).splitlines()[0]}"
        if problem:
            Decoder.graphs, self.replay = False, None
            print(f"warning   {problem}; decoding goes on without graphs, several times slower", file=sys.stderr)


def pick(logits, temperature, noise, top_p=1.0):
    """One token a row, (B,), and its log-probability, (B,): argmax at temperature 0, else by `noise`.

    noise (B, 1) is uniform in [0, 1): the token is where it falls on the cumulated probabilities.
    With top_p < 1 only the likeliest tokens whose probabilities sum up to top_p can be picked; the
    log-probability is that of the whole distribution all the same.
    """
    logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logps.argmax(-1, keepdim=True)
    else:
        probs = logps.exp()  # (B, V)
        if top_p < 1:
            rising, order = probs.sort(-1)
            rare = rising.cumsum(-1) <= 1 - top_p  # (B, V) cut where transformers cuts
            rare[:, -1] = False  # the likeliest always stays
            probs = probs.masked_fill(rare.scatter(-1, order, rare), 0)
        cumulated = probs.cumsum(-1, dtype=torch.double)
        tokens = torch.searchsorted(cumulated, noise.double() * cumulated[:, -1:], right=True)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0]


@torch.no_grad()
def sample(
    model, prompts, num_samples, max_new_tokens, eos, temperature=1.0, seed=0, top_p=1.0,
    progress=None,
):
    """Complete each prompt `num_samples` times.

    prompts: list of P lists of ids, of any lengths; eos: list of ids that end a completion; seed: an
    int, or a list of P ints. The chance of prompt i hangs on its seed alone (seed + i, for an int), not
    on the other prompts.
    Returns tokens (B, T) int64, mask (B, T) bool and logps (B, T) fp32 with B = P * num_samples and
    T the longest completion. Row i * num_samples + j is completion j of prompt i. The mask covers a
    completion and its EOS; a completion cut at max_new_tokens has none. Outside the mask all is 0.
    Temperature 0 is greedy and equals transformers' generate token for token. top_p < 1 leaves the
    unlikely tokens out (see pick); training never does, for it would score other odds than it drew from.
    progress(token, finished) is called after every token step: token steps done, rows finished.
    """
    model.eval()
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    draw = lambda s: torch.rand(max_new_tokens, num_samples, generator=torch.Generator().manual_seed(s))
    noise = torch.cat([draw(s) for s in seeds], 1).T.to(model.device)  # (B, max_new_tokens)
    decoder = Decoder(model, Prompts(model, prompts), num_samples)
    tokens = torch.zeros(noise.shape, dtype=torch.long, device=model.device)  # (B, T)
    mask, logps, eos = tokens.bool(), tokens.float(), torch.tensor(eos, device=model.device)
    share = 0.5 if on_gpu(model) else 0.8  # what leaving costs: a new graph, a copy of the cache
    alive = torch.ones_like(decoder.rows, dtype=torch.bool)  # which rows of the batch have not ended
    for t in range(max_new_tokens):
        rows = decoder.rows
        drawn, logps[rows, t] = pick(decoder.next(t), temperature, noise[rows, t, None], top_p)
        tokens[rows, t], mask[rows, t] = drawn, alive
        decoder.tokens.copy_(drawn)
        alive &= ~torch.isin(drawn, eos)
        left = int(alive.sum())
        if progress is not None:
            progress(t + 1, len(tokens) - left)
        if left == 0:
            break
        if left <= share * len(rows):
            decoder.keep(alive)
            alive = alive[alive]
    return [(x * mask)[:, : t + 1] for x in (tokens, mask, logps)]


# ------------------------------------------------------------------------- 3. log-probabilities

LOGITS = 9_000_000  # logits held at once: 36 MB in fp32; below 32 MiB glibc would not give them back
ON_GPU = 16  # times as many there, or the output layer would be read more than used


def token_logps(model, prompts, tokens, mask, temperature=1.0, group=None):
    """log pi(token t of row b | its prompt and the tokens before), (B, T) fp32, 0 outside the mask.

    prompts: list of B lists of ids, or, with group (B,) int64, of P lists or Prompts, where group[b] is
    the prompt of row b. tokens (B, T) int64; mask (B, T) bool, true on a first stretch of every row.
    Differentiable. The output layer sees completion positions only, a few at a time, and is computed
    again in the backward pass, so the (B, T, V) logits never exist.
    """
    if not isinstance(prompts, Prompts):
        prompts = Prompts(model, prompts)
    group = torch.arange(len(tokens), device=tokens.device) if group is None else group
    T = int(mask.sum(1).max())
    ids = torch.cat([prompts.last[group][:, None], tokens[:, : T - 1]], 1).masked_fill(~mask[:, :T], 0)  # (B, T)
    t = torch.arange(T, device=ids.device)
    before = prompts.visible[group][:, None, None].expand(-1, 1, T, -1)  # (B, 1, T, L)
    causal = (t <= t[:, None]).expand(len(ids), 1, T, T)

    def attend(module, query, key, value, mask, **kwargs):
        key = torch.cat([prompts.keys[module.layer_idx][group], key], 2)  # (B, heads, L + T, dim)
        value = torch.cat([prompts.values[module.layer_idx][group], value], 2)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]

    positions = prompts.lengths[group][:, None] + t  # (B, T)
    hidden = forward(model, ids, positions, torch.cat([before, causal], -1), attend)[mask[:, :T]]  # (N, d)
    head = model.get_output_embeddings()

    def logps_of(hidden, targets):
        logits = head(hidden).float() / temperature
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    parts = max(1, len(hidden) * head.weight.shape[0] // (LOGITS * (ON_GPU if on_gpu(model) else 1)))
    chunks = [
        checkpoint(logps_of, h, y, use_reentrant=False, preserve_rng_state=False)
        for h, y in zip(hidden.tensor_split(parts), tokens[mask].tensor_split(parts), strict=True)
    ]
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(chunks))  # (B, T)


@dataclasses.dataclass
class Batch:
    """B completions of P prompts with all that an update needs; tensors are (B, T) or (B,)."""

    prompts: list
    group: torch.Tensor  # which prompt is a row's
    tokens: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    rows: torch.Tensor | None = None  # of a part that passes() gives: its rows in the whole

    def select(self, rows):
        """The part with only `rows`, an index tensor, in that order, and the prompts that they need."""
        chosen = {name: x[rows] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        used, chosen["group"] = self.group[rows].unique(return_inverse=True)
        return dataclasses.replace(self, prompts=[self.prompts[i] for i in used.tolist()], **chosen)

    def between(self, start, end):
        """The part of prompts start, ..., end - 1."""
        return self.select(((self.group >= start) & (self.group < end)).nonzero()[:, 0])

    def shares(self, size):
        """Parts of `size` prompts each, the last one perhaps of fewer."""
        return [self.between(start, start + size) for start in range(0, len(self.prompts), size)]


def make_batch(groups, advantages, device):
    """The Batch of all completions of some Groups, whose advantages are (groups, num_samples)."""
    tokens, lengths = pad([ids for group in groups for ids in group.completions], device)  # (B, T), (B,)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]  # (B, T)
    group = torch.arange(len(groups), device=device).repeat_interleave(advantages.shape[1])  # (B,)
    return Batch([group.prompt for group in groups], group, tokens, mask, advantages.flatten().to(device))


def pieces(lengths, budget):
    """Cut a list of lengths into [start, end) with (end - start) * longest <= budget, or of one item."""
    start = longest = 0
    for i, n in enumerate(lengths):
        longest = max(longest, n)
        if i > start and (i + 1 - start) * longest > budget:
            yield start, i
            start, longest = i, n
    if lengths:
        yield start, len(lengths)


def passes(model, batch, config):
    """This rank's rows of a Batch, a micro-batch at a time, longest first: (part, its log-probabilities (B, T)).

    A rank takes every WORLD-th prompt. Call backward() on each before the next: what belongs to the prompts
    follows when all of their rows are through. No pass holds more than config.micro_tokens tokens, padding included.
    """
    parallel.gather_weights(model)
    mine = (batch.group % parallel.WORLD == parallel.RANK).nonzero()[:, 0]
    batch = dataclasses.replace(batch, rows=torch.arange(len(batch.mask), device=batch.mask.device)).select(mine)
    for start, end in pieces([len(prompt) for prompt in batch.prompts], config.micro_tokens):
        whole = batch.between(start, end)
        lengths, order = whole.mask.sum(1).sort(descending=True, stable=True)
        with shared_prompts(model, whole.prompts) as prompts:
            for first, last in pieces(lengths.tolist(), config.micro_tokens):
                rows = order[first:last]
                part, group = whole.select(rows), whole.group[rows]
                yield part, token_logps(model, prompts, part.tokens, part.mask, config.temperature, group)


@torch.no_grad()
def batch_logps(model, batch, config):
    """The log-probabilities of a whole Batch without gradient or dropout, (B, T): all ranks' rows, on every rank."""
    model.eval()
    logps = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for part, found in passes(model, batch, config):
        logps[part.rows] = found
    return parallel.add(logps)


# ------------------------------------------------------------------------- 4. groups and their figures


class Answer(NamedTuple):
    """One sampled completion."""

    ids: list  # token ids, with the EOS
    text: str  # without the EOS
    cut: bool  # whether it was cut at max_new_tokens
    logp: float  # log-probability of the completion


def sample_answers(
    model, tokenizer, prompts, num_samples, max_new_tokens, temperature=1.0, seed=0, top_p=1.0,
    progress=None,
):
    """sample() as a list of Answers; answer j of prompt i has index i * num_samples + j."""
    eos = eos_ids(model, tokenizer)
    tokens, mask, logps = sample(
        model, prompts, num_samples, max_new_tokens, eos, temperature, seed, top_p, progress
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
    """One task and its completions, a list of ids with their EOS each.

    Sampled ones also have their texts, rewards, grades, and whether they were cut.
    """

    prompt: list
    example: data.Example
    completions: list
    texts: list = ()
    rewards: list = ()
    cut: list = ()
    grades: list = ()


def rollout(model, tokenizer, tasks, config, num_samples, temperature, seed):
    """Complete and score `tasks`, each `num_samples` times: a list of Groups, and the seconds it took.

    Every rank samples its share. Task i uses seed + i, so any rank may sample it.
    """
    started, groups, answers = time.perf_counter(), [], []
    parallel.gather_weights(model)
    mine, seeds = parallel.share(tasks), parallel.share(range(seed, seed + len(tasks)))
    if mine:  # there may be fewer tasks than ranks
        prompts = [prompt for prompt, _ in mine]
        answers = sample_answers(
            model, tokenizer, prompts, num_samples, config.max_new_tokens, temperature, seeds
        )
    sampled = time.perf_counter()
    finite = all(math.isfinite(answer.logp) for answer in answers)
    for i, (prompt, example) in enumerate(mine):  # groups by position, never by content
        group = answers[i * num_samples : (i + 1) * num_samples]
        grades = [reward.grade(answer.text, example) for answer in group]
        rewards = [reward.total(grade, example, config.correctness) for grade in grades]
        if not finite:  # the weights have overflowed: NaN rewards stop the run
            rewards = [math.nan] * num_samples
        completions, texts, cut, _ = zip(*group)
        groups.append(Group(prompt, example, completions, texts, rewards, cut, grades))
    groups = parallel.gather(groups)
    return groups, {"seconds_sample": sampled - started, "seconds_score": time.perf_counter() - sampled}


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
    several = len(groups[0].rewards) > 1  # one answer has no spread
    lengths = [len(ids) for group in groups for ids in group.completions]
    stds = [torch.tensor(group.rewards).std().item() if several else 0.0 for group in groups]
    return summarize(groups) | {
        "reward_std": mean(stds),
        "no_spread": mean(max(group.rewards) == min(group.rewards) for group in groups),
        "completion_length": mean(lengths),
        "truncated": mean(cut for group in groups for cut in group.cut),
    }


def evaluate(model, tokenizer, tasks, config):
    """Figures over held-out `tasks`: those of summarize() for greedy answers, but the reward of sampled ones."""
    size, greedy, sampled = config.prompts_per_step * config.num_samples, [], []
    hidden = config.quiet or parallel.RANK > 0 or None
    for start in tqdm(range(0, len(tasks), size), "held-out tasks", leave=False, disable=hidden):
        part = tasks[start : start + size]
        greedy += rollout(model, tokenizer, part, config, 1, 0, start)[0]
        sampled += rollout(model, tokenizer, part, config, 1, config.temperature, start)[0]
    return summarize(greedy) | {"reward": summarize(sampled)["reward"]}
