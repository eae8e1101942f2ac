"""What an update does to the answers of one group: the log-probabilities of their tokens.

page.html shows them. The pass before the update and the one after it draw no random numbers and
are in no measured time.
"""

import dataclasses
import math

import torch

import rollout


class Watch:
    """Watches one group through the update of every step that is shown."""

    def __init__(self, model, tokenizer, config):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.group = None  # of this step; None if nothing is shown

    def before(self, groups):
        """Choose the group: the first whose advantages are not all 0, as others teach nothing.

        All ranks call this, because a pass through sharded weights needs them all.
        """
        if groups[0].texts:  # sft.py samples nothing
            self.group = next((group for group in groups if any(group.advantages)), groups[0])
            self.old = self.logps()

    def after(self):
        """(text, log-probability before the update, after it) of every token: a list per answer."""
        answers = []
        for ids, old, new in zip(self.group.completions, self.old, self.logps(), strict=True):
            texts = self.tokenizer.batch_decode([[i] for i in ids])
            answers.append(list(zip(texts, old, new, strict=True)))
        return answers

    def logps(self):
        """The log-probabilities of the tokens now, a list per answer; None if not finite."""
        group = dataclasses.replace(self.group)  # a copy: make_batch() sets its advantages
        zeros = torch.zeros(1, len(group.completions))
        batch = rollout.make_batch([group], zeros, self.model.device)
        answers = []
        for row, kept in zip(rollout.batch_logps(self.model, batch, self.config), batch.mask):
            row = [round(x, 4) + 0.0 if math.isfinite(x) else None for x in row[kept].tolist()]
            answers.append(row)
        return answers
