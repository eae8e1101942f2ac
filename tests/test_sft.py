"""SFT: its loss is ordinary cross entropy, and it neither samples nor scores."""

import pytest
import torch
from conftest import random_model
from torch.nn.functional import cross_entropy

import data
import recode
import reward
import sft

ROW = data.Example("lib", "2.0", "", "f is now g", "lib.f(1)  # old", "lib.g(1)")


def test_a_target_earns_the_full_reward(tokenizer):
    """Stops a target that lacks EOS, is not the reference, or whose format the reward penalises."""
    ids = data.encode_target(ROW, tokenizer)
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
    text = tokenizer.decode(ids[:-1])
    assert reward.score(text, ROW.new_code) == 3.0 and reward.extract_code(text) == ROW.new_code
    assert text.startswith("\n\n</think>")


def test_loss_is_the_cross_entropy_of_the_target(checkpoints, tokenizer):
    """Stops a loss on prompt tokens, a shift by one, a mean per row, and an EOS without loss.

    The oracle is torch's cross_entropy.
    """
    model = random_model("qwen2", len(tokenizer)).requires_grad_(True)
    examples = [
        ROW,
        data.Example(
            "lib", "3.0", "", "h is gone; use the longer_name", "lib.h(2)", "lib.longer_name(2)"
        ),
    ]
    tasks = data.encode_tasks(examples, tokenizer, 999)
    config = sft.Config(prompts_per_step=2, max_new_tokens=4, micro_tokens=1)
    batch, _, groups, position = sft.collect(model, tokenizer, tasks, 0, config)
    loss = sft.accumulate(model, batch, config)["loss"]
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, count = 0.0, 0
    for prompt, example in tasks:
        target = data.encode_target(example, tokenizer)
        labels = torch.tensor([[-100] * len(prompt) + target])
        logits = model(torch.tensor([prompt + target])).logits
        total += cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += len(target)
    (total / count).backward()
    assert loss == pytest.approx((total / count).item(), abs=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4)
    assert position == 2 and all(len(group.completions) == 1 for group in groups)


def test_nothing_is_sampled(tokenizer, monkeypatch):
    """Stops sampled answers or rewards from costing time or changing the baseline's gradient."""
    model, batches = random_model("qwen2", len(tokenizer)), []
    tasks = data.encode_tasks([ROW], tokenizer, 999)
    monkeypatch.setattr(recode, "sample", lambda *_, **__: pytest.fail("sampled"))
    for value, seed in ((3.0, 1), (-3.0, 2)):
        monkeypatch.setattr(reward, "total", lambda *_, value=value: value)
        config = sft.Config(max_new_tokens=8, seed=seed)
        batch, metrics, groups, _ = sft.collect(model, tokenizer, tasks, 0, config)
        batches.append(batch)
        assert metrics == {"completion_length": len(groups[0].completions[0])}
    assert torch.equal(batches[0].tokens, batches[1].tokens) and torch.equal(
        batches[0].advantages, torch.ones(1)
    )
