"""naive_grpo.py against grpo.py: the same algorithm, so the same numbers."""

import copy

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import data
import grpo
import recode
import naive_grpo

CONFIG = grpo.Config()


def grpo_loss(logps, old_logps, ref_logps, advantages, mask):
    """grpo.py's loss on a whole update batch."""
    objective = grpo.objective(logps, old_logps, ref_logps, advantages, CONFIG)
    return -(grpo.token_weights(mask, CONFIG) * objective).sum()


def load():
    return AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32).eval()


def test_settings_are_those_of_grpo():
    """Stops the lesson from teaching another clip or beta than grpo.py's."""
    assert CONFIG.clip_low == CONFIG.clip_high == naive_grpo.CLIP
    assert CONFIG.beta == naive_grpo.BETA


def test_advantages():
    """Stops a biased standard deviation, another epsilon, or a mean over more than the group."""
    rewards = torch.tensor([[3.0, -1.0, 1.67, 2.5], [0.5, 0.5, 0.5, 0.5], [-3.0, 3.0, 3.0, 3.0]])
    torch.testing.assert_close(
        naive_grpo.advantages(rewards), grpo.advantages(rewards), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("moved", [0.0, 0.1, 1.0], ids=["on policy", "near", "far"])
def test_loss_and_gradient(moved):
    """Stops a ratio, clip, KL term or weight that differs from grpo.py's, on and off policy."""
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 4, 7, 2, 9, 3, 5])
    mask = torch.arange(9) < lengths[:, None]  # (8, 9)
    logps = -3 * torch.rand(mask.shape, dtype=torch.double)
    old_logps = logps + moved * torch.randn(mask.shape, dtype=torch.double)
    ref_logps = logps + 0.5 * torch.randn(mask.shape, dtype=torch.double)
    advantages = grpo.advantages(3 * torch.randn(2, 4, dtype=torch.double)).flatten()
    found = []
    for loss in (naive_grpo.loss, grpo_loss):
        leaf = logps.clone().requires_grad_()
        value = loss(leaf, old_logps, ref_logps, advantages, mask)
        value.backward()
        found.append((value.item(), leaf.grad))
    (value, gradient), (expected, expected_gradient) = found
    assert value == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    assert not gradient[~mask].any()


def fixed_batch(tokenizer):
    """Two prompts of different lengths with three completions each, one of them only an EOS."""
    examples = data.load_examples(str(ROOT / "tiny" / "train.jsonl"))
    prompts = [data.encode_prompt(example, tokenizer) for example in examples[:2]]
    assert len(prompts[0]) != len(prompts[1])
    torch.manual_seed(0)
    completions = [torch.randint(256, (length,)).tolist() for length in (0, 11, 5, 20, 2, 8)]
    return prompts, [ids + [tokenizer.eos_token_id] for ids in completions]


def test_loss_and_gradient_of_a_model(tokenizer):
    """Stops log-probabilities that are shifted by one token or depend on the padding."""
    prompts, completions = fixed_batch(tokenizer)
    longest = max(map(len, completions))
    padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in completions]
    tokens = torch.tensor(padded)  # (6, T)
    mask = torch.arange(longest) < torch.tensor([len(ids) for ids in completions])[:, None]
    group = torch.arange(2).repeat_interleave(3)
    left = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = torch.cat([left.input_ids[group], tokens], 1)  # (6, L + T)
    visible = torch.cat([left.attention_mask[group], mask], 1)

    model = load()
    reference = copy.deepcopy(model)
    with torch.no_grad():  # a policy that has moved, so that the KL term is not 0
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def naive(policy):
        return naive_grpo.log_probs(policy, ids, visible, longest)

    def shared_prompt(policy):
        return recode.token_logps(policy, [prompts[i] for i in group], tokens, mask)

    rewards = torch.tensor([[3.0, -1.0, 0.5], [1.0, 2.0, -3.0]])
    advantages = grpo.advantages(rewards).flatten()
    found = []
    for log_probs, loss in ((naive, naive_grpo.loss), (shared_prompt, grpo_loss)):
        logps = log_probs(model)
        with torch.no_grad():
            ref_logps = log_probs(reference)
        value = loss(logps, logps.detach(), ref_logps, advantages, mask)
        model.zero_grad()
        value.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        found.append((logps.detach() * mask, value.item(), gradients))
    (logps, value, gradients), (expected_logps, expected, expected_gradients) = found
    # fp32 kernels differ from CPU to CPU: up to 1e-6 of a log-probability, 7e-6 of a gradient
    torch.testing.assert_close(logps, expected_logps, rtol=2e-6, atol=1e-5)
    assert value == pytest.approx(expected, abs=1e-5) and abs(value) > 1e-4
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


def test_generate(tokenizer, monkeypatch):
    """Stops a mask without EOS or with tokens after it, and sampling with top-k or top-p."""
    prompts, _ = fixed_batch(tokenizer)
    model = load()
    real, outputs = model.generate, []

    def generate(**settings):
        details = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        outputs.append(real(**settings, **details))
        return outputs[0].sequences

    monkeypatch.setattr(model, "generate", generate)
    torch.manual_seed(0)
    ids, visible, mask = naive_grpo.generate(model, tokenizer, prompts)
    for scores, logits in zip(outputs[0].scores, outputs[0].logits, strict=True):
        torch.testing.assert_close(scores, logits)  # nothing truncated, nothing scaled
    longest = max(map(len, prompts))
    assert ids.shape == visible.shape and len(ids) == 2 * naive_grpo.G
    assert visible[:, :longest].sum(1).tolist() == [
        len(prompt) for prompt in prompts for _ in range(naive_grpo.G)
    ]
    assert torch.equal(visible[:, longest:].bool(), mask)
    for row, kept in zip(ids[:, longest:].tolist(), mask.sum(1).tolist(), strict=True):
        ends = [t for t, token in enumerate(row) if token == tokenizer.eos_token_id]
        assert kept == (ends[0] + 1 if ends else len(row))


@pytest.mark.slow
def test_it_learns(monkeypatch, capsys):
    """Stops a lesson whose rewards do not rise, e.g. a wrong sign or a step never taken."""
    monkeypatch.setattr(naive_grpo, "STEPS", 6)
    monkeypatch.setattr(naive_grpo, "LR", 3e-4)
    naive_grpo.main()
    rewards = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert len(rewards) == 6
    assert sum(rewards[4:]) / 2 > sum(rewards[:2]) / 2 + 0.3


def test_it_stays_small():
    """Stops the file for beginners from growing into a second grpo.py."""
    assert len((ROOT / "naive_grpo.py").read_text().splitlines()) <= 105
