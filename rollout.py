"""The rollout: groups of completions, sampled and scored, and the batch that an update takes.

    sample_answers  completions of any prompts, as text
    sample_groups   the same for tasks, with their rewards: a Group per task
    make_batch      all completions of some groups as tensors, with their advantages: a Batch
    passes          the rows of a prompt in parts that fit into memory
"""

import dataclasses
import math
from statistics import fmean as mean
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import recode
import reward
from lib import fsdp, parallel


class Answer(NamedTuple):
    """One sampled completion."""

    ids: list  # token ids, with the EOS
    text: str  # without the EOS
    cut: bool  # whether it was cut at max_new_tokens
    logp: float  # log-probability of the completion


def eos_ids(model, tokenizer):
    """The ids that end a completion, list[int]: generate's and the tokenizer's own."""
    listed = model.generation_config.eos_token_id  # an int, a list of ints, or None
    if not isinstance(listed, list):
        listed = [] if listed is None else [listed]
    return sorted({tokenizer.eos_token_id, *listed})


def sample_answers(
    model, tokenizer, prompts, num_samples, max_new_tokens, temperature=1.0, seed=0, top_p=1.0,
    progress=None,
):  # fmt: skip
    """recode.sample() as a list of Answers; answer j of prompt i has index i * num_samples + j."""
    eos = eos_ids(model, tokenizer)
    tokens, mask, logps = recode.sample(
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
    """A task and its completions, lists of ids with EOS; only a sampled one has the rest."""

    prompt: list
    example: data.Example
    completions: list
    texts: list = ()
    rewards: list = ()
    cut: list = ()  # whether a completion was cut at max_new_tokens
    grades: list = ()
    advantages: list = ()  # in the update batch; DAPO's dropped groups have none


def sample_groups(model, tokenizer, tasks, config, position):
    """Sample and score config.num_samples completions of every task: a list of Groups.

    Every rank samples its share. Task i of the stream uses a seed of its own, so any rank may
    sample it.
    """
    if config.adapter == "none":
        fsdp.gather_weights(model)
    first = config.seed * 1_000_003 + position  # the next seed begins 1,000,003 tasks later
    n = config.num_samples
    mine = parallel.share(tasks)
    seeds = parallel.share(range(first, first + len(tasks)))
    answers = []
    if mine:  # there may be fewer tasks than ranks
        prompts = [prompt for prompt, _ in mine]
        settings = n, config.max_new_tokens, config.temperature, seeds
        answers = sample_answers(model, tokenizer, prompts, *settings)
    groups = []
    for i, (prompt, example) in enumerate(mine):  # groups by position, never by content
        completions, texts, cut, logps = zip(*answers[i * n : (i + 1) * n])
        grades = [reward.grade(text, example) for text in texts]
        rewards = [reward.total(grade, example, config.correctness) for grade in grades]
        if not math.isfinite(sum(logps)):  # weights have overflowed: rewards of NaN stop the run
            rewards = [math.nan] * n
        groups.append(Group(prompt, example, completions, texts, rewards, cut, grades))
    return parallel.gather(groups)


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
    rows: torch.Tensor | None = None  # of a part: its rows in the batch that it was selected from

    def select(self, rows):
        """The part with `rows` only, an index tensor, in that order; prompts and group stay."""
        part = {"rows": rows}
        for name in ("group", "tokens", "mask", "advantages", "old_logps", "ref_logps"):
            value = getattr(self, name)
            part[name] = None if value is None else value[rows]
        return dataclasses.replace(self, **part)

    def split(self, size):
        """Parts of `size` prompts each; the last one may have fewer."""
        parts = []
        for start in range(0, len(self.prompts), size):
            part = self.select((self.group // size == start // size).nonzero()[:, 0])
            part.prompts = self.prompts[start : start + size]
            part.group = part.group - start
            parts.append(part)
        return parts


def make_batch(groups, advantages, device):
    """The Batch of some Groups, which keep their rows of advantages (groups, num_samples)."""
    for group, row in zip(groups, advantages.tolist(), strict=True):
        group.advantages = row
    rows = [torch.tensor(ids) for group in groups for ids in group.completions]
    tokens = torch.zeros(0, 0, dtype=torch.long)  # DAPO may find no group
    if rows:
        tokens = pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, T)
    mask = tokens >= 0  # (B, T)
    group = torch.arange(len(groups)).repeat_interleave(advantages.shape[1])  # (B,)
    tensors = [x.to(device) for x in (group, tokens * mask, mask, advantages.flatten())]
    return Batch([each.prompt for each in groups], *tensors)


def passes(batch, i, micro_tokens):
    """The rows of prompt i in parts for one pass each, longest rows first: a list of Batches.

    Rows times the longest is at most `micro_tokens`, unless there is one row only; a row of less
    than half the longest starts a new part, as it would be mostly padding.
    """
    rows = (batch.group == i).nonzero()[:, 0]
    lengths, order = batch.mask[rows].sum(1).sort(descending=True, stable=True)
    lengths = lengths.tolist()
    parts = []
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        end = start + 1
        most = min(len(lengths), start + micro_tokens // longest)
        while end < most and 2 * lengths[end] >= longest:
            end += 1
        parts.append(batch.select(rows[order[start:end]]))
        start = end
    return parts


@torch.no_grad()
def batch_logps(model, batch, config):
    """The log-probabilities of a Batch without gradient or dropout, (B, T), on every rank."""
    model.eval()
    logps = torch.zeros(batch.mask.shape, device=batch.mask.device)
    if config.adapter == "none":
        fsdp.gather_weights(model)  # all ranks take part, also one without a prompt
    for i in parallel.share(range(len(batch.prompts))):
        with recode.shared_prompt(model, batch.prompts[i]) as prompt:
            for part in passes(batch, i, config.micro_tokens):
                logps[part.rows] = recode.completion_logps(model, prompt, part, config.temperature)
    return parallel.sum_ranks(logps)


def summarize(groups):
    """Means over all answers, in [0, 1] but for reward; obeys is None if no note names a word."""
    grades = [grade for group in groups for grade in group.grades]
    obeys = [grade.obeys for grade in grades if grade.obeys is not None]
    metrics = {"format": mean(grade.format > 0 for grade in grades)}
    for name in ("es", "em", "stale"):
        metrics[name] = mean(getattr(grade, name) for grade in grades)
    metrics["obeys"] = mean(obeys) if obeys else None
    metrics["reward"] = mean(value for group in groups for value in group.rewards)
    return metrics


def describe(groups):
    """The metrics of a rollout: those of summarize(), spread within groups, lengths; floats."""
    metrics = summarize(groups)
    metrics["reward_std"] = mean(torch.tensor(group.rewards).std().item() for group in groups)
    metrics["no_spread"] = mean(max(group.rewards) == min(group.rewards) for group in groups)
    metrics["completion_length"] = mean(len(ids) for group in groups for ids in group.completions)
    metrics["truncated"] = mean(cut for group in groups for cut in group.cut)
    return metrics
