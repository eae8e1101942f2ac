"""GRPO: the objective against TRL, verl and by hand, and the batch that collect() builds."""

import json
import math

import pytest
import torch
from conftest import SHARED

import dapo
import data
import grpo
import rollout
import reward
import naive_grpo
from lib import loading

# ------------------------------------------------------------------------- the objective

GOLDEN = (
    json.loads((SHARED / "golden_losses.json").read_text())
    if SHARED.is_dir()
    else {"cases": [], "advantages": []}
)
CASES = [
    case for case in GOLDEN["cases"] if "grpo" in case["name"] and "dr_grpo" not in case["name"]
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_objective_equals_the_peers(case):
    """Stops a loss, gradient or advantage that is not TRL's or verl's GRPO."""
    read = lambda name: (
        None if case[name] is None else torch.tensor(case[name], dtype=torch.float64)
    )
    new, ref, A, settings = (
        read("new_logps").requires_grad_(),
        read("ref_logps"),
        read("advantages"),
        case["params"],
    )
    old = new.detach() if case["on_policy"] else read("old_logps")
    clip = (
        settings.get("eps_low", settings.get("low")),
        settings.get("eps_high", settings.get("high")),
    )
    beta = settings.get("beta", settings.get("kl_coef")) or 0.0
    config = grpo.Config(clip_low=clip[0], clip_high=clip[1], beta=beta)
    weights = grpo.token_weights(torch.tensor(case["mask"]).bool(), config)
    loss = -(weights * grpo.objective(new, old, ref, A, config)).sum()
    gradient = torch.autograd.grad(loss, new)[0]
    if beta and case["peer"] == "trl" and settings.get("bias_kl", True):
        # TRL's default KL term is rho k3: the same value, but rho adds to the gradient
        k3 = grpo.objective_terms(new.detach(), old, ref, A, config)[1]
        gradient += beta * weights * k3
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, read("grad_new_logps"), atol=1e-9, rtol=0)
    if "scale_rewards_none" not in case["name"]:
        rewards = read("rewards").view(-1, case["num_generations"])
        std = rewards.std(1, keepdim=True)
        epsilon = (std + 1e-4) / (std + 1e-6) if case["peer"] == "verl" else 1.0
        torch.testing.assert_close(
            (grpo.advantages(rewards) * epsilon).flatten(), A, atol=1e-5, rtol=0
        )


def test_advantages_by_hand():
    """Stops a biased std, a mean over several groups, and a division by zero without spread."""
    got = grpo.advantages(
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [-3.0, -3.0, -3.0, 1.0]])
    )
    a, b = 1 / (math.sqrt(5 / 3) + 1e-4), 1 / (2 + 1e-4)
    expected = torch.tensor(
        [[-1.5 * a, -0.5 * a, 0.5 * a, 1.5 * a], [0.0] * 4, [-b, -b, -b, 3 * b]]
    )
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    for case in GOLDEN["advantages"]:
        rewards = torch.tensor(case["rewards"]).view(-1, case["num_generations"])
        theirs = torch.tensor(case["trl_group"])
        torch.testing.assert_close(grpo.advantages(rewards).flatten(), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_samples", [2, 3, 7, 8, 16, 64])
def test_equal_rewards_give_no_gradient(num_samples, dtype):
    """Stops the rounding of a mean from becoming an advantage: 0.0024 for eight times 2.9."""
    values = torch.linspace(-3, 3, 1001, dtype=dtype)
    rewards = values[:, None].expand(-1, num_samples)
    assert (rewards.mean(1) != values).any() or num_samples == 2  # else this test shows nothing
    for module in (grpo, dapo, naive_grpo):
        assert (module.advantages(rewards) == 0).all(), module.__name__


@pytest.mark.parametrize(
    "A, ratio, value, slope",
    [
        (1, 0.5, 0.5, 1),
        (1, 1.0, 1, 1),
        (1, 1.5, 1.2, 0),
        (-1, 0.5, -0.8, 0),
        (-1, 1.0, -1, -1),
        (-1, 1.5, -1.5, -1),
    ],
)
def test_clip_acts_on_the_right_side(A, ratio, value, slope):
    """Stops a clip that is inverted for negative advantages; value and d J / d ratio by hand."""
    rho = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    J = grpo.objective(
        rho.log(), torch.zeros(1, 1), None, torch.tensor([float(A)]), grpo.Config(beta=0.0)
    )
    assert J.item() == pytest.approx(value) and torch.autograd.grad(J, rho)[
        0
    ].item() == pytest.approx(slope)


def test_kl_pulls_towards_the_reference():
    """Stops a KL term without gradient on policy, e.g. mean(new - ref), and a negative one."""
    new = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    ref, step = torch.tensor([[-1.5, -1.0, -0.5]], dtype=torch.float64), 1e-6
    config = grpo.Config(beta=0.5)
    term = lambda x: grpo.objective(x, x.detach(), ref, torch.zeros(1), config)
    gradient = torch.autograd.grad(term(new).sum(), new)[0]
    with torch.no_grad():
        assert (term(new) <= 0).all()
        torch.testing.assert_close(
            gradient, (term(new + step) - term(new - step)) / (2 * step), atol=1e-8, rtol=0
        )
    assert torch.equal(gradient.sign(), (ref - new).sign())


def test_token_weights_by_hand():
    """Stops a mean over the wrong tokens.

    Every completion weighs 1/N, split equally among its tokens, EOS included.
    """
    weights = grpo.token_weights(
        torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool(), grpo.Config()
    )
    expected = torch.tensor([[1 / 9, 1 / 9, 1 / 9, 0], [1 / 3, 0, 0, 0], [1 / 12] * 4])
    torch.testing.assert_close(weights, expected, check_dtype=False)


# ------------------------------------------------------------------------- a rollout


def test_collect_keeps_equal_prompts_apart(checkpoints, tokenizer, monkeypatch):
    """Stops merging equal prompts into one group, and advantages in a group without spread."""
    model = loading.load_model(checkpoints["qwen2"])
    a, b = (
        ([5, 6, 7, n], data.Example("lib", "2.0", "", f"note {n}", "a = 1", f"a = {n}"))
        for n in (8, 9)
    )
    scores, asked = iter([1.0, 2.0, 3.0, 6.0, 2.0, 2.0, 2.0, 2.0, 7.0, 7.0, 7.0, 4.0]), []
    ask = lambda grade, example, _: asked.append(example.new_code) or next(scores)
    monkeypatch.setattr(reward, "total", ask)
    monkeypatch.setattr(rollout, "eos_ids", lambda *_: list(range(0, 600, 5)))
    config = grpo.Config(prompts_per_step=3, num_samples=4, max_new_tokens=8)
    batch, metrics, groups, position = grpo.collect(model, tokenizer, [a, b, a], 3, config)
    expected = grpo.advantages(
        torch.tensor([[1.0, 2.0, 3.0, 6.0], [2.0] * 4, [7.0, 7.0, 7.0, 4.0]])
    ).flatten()
    assert (
        torch.equal(batch.advantages, expected)
        and not batch.advantages[4:8].any()
        and batch.advantages[3] > 1
    )
    assert (
        metrics["no_spread"] == pytest.approx(1 / 3) and metrics["reward"] == 3.75 and position == 6
    )
    assert metrics["tries"] == 1 and metrics["groups"] == 3
    drawn = data.draw([a, b, a], 3, 3, config.seed)
    assert (
        batch.prompts == [prompt for prompt, _ in drawn]
        and batch.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )
    assert asked == [example.new_code for _, example in drawn for _ in range(4)]
    assert [(group.prompt, group.example) for group in groups] == drawn
    lengths = batch.mask.sum(1)
    assert [ids for group in groups for ids in group.completions] == [
        row[:n].tolist() for row, n in zip(batch.tokens, lengths)
    ]
    ended = batch.tokens[torch.arange(12), lengths - 1] % 5 == 0
    assert metrics["truncated"] == pytest.approx(1 - ended.float().mean().item())
    assert (lengths == 8)[~ended].all()
    assert metrics["completion_length"] == batch.mask.sum().item() / 12 and ended.any()
