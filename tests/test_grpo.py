"""GRPO: the objective against the peers' numbers and by hand, one update against brute force, stop and go on."""

import errno
import io
import json
import math
import multiprocessing
import os
import random
import signal
import zlib

import pytest
import torch
from conftest import SHARED, random_model
from torch.utils._pytree import tree_flatten

import data
import grpo
import dora
import recode
import reward
import run

# ------------------------------------------------------------------------- the objective

GOLDEN = json.loads((SHARED / "golden_losses.json").read_text()) if SHARED.is_dir() else {"cases": [], "advantages": []}
CASES = [case for case in GOLDEN["cases"] if "grpo" in case["name"] and "dr_grpo" not in case["name"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_objective_equals_the_peers(case):
    """Stops a loss that is not TRL's and verl's GRPO, in value, gradient or advantage."""
    read = lambda name: None if case[name] is None else torch.tensor(case[name], dtype=torch.float64)
    new, ref, A, settings = read("new_logps").requires_grad_(), read("ref_logps"), read("advantages"), case["params"]
    old = new.detach() if case["on_policy"] else read("old_logps")
    clip = settings.get("eps_low", settings.get("low")), settings.get("eps_high", settings.get("high"))
    beta, weights = settings.get("beta", settings.get("kl_coef")), grpo.token_weights(torch.tensor(case["mask"]).bool())
    loss = -(weights * grpo.objective(new, old, ref, A, *clip, beta)).sum()
    gradient = torch.autograd.grad(loss, new)[0]
    if beta and case["peer"] == "trl" and settings.get("bias_kl", True):
        gradient += beta * weights * grpo.k3(new.detach(), ref)  # TRL's default is rho k3: equal but for d rho
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, read("grad_new_logps"), atol=1e-9, rtol=0)
    if "scale_rewards_none" not in case["name"]:
        rewards = read("rewards").view(-1, case["num_generations"])
        std = rewards.std(1, keepdim=True)
        epsilon = (std + 1e-4) / (std + 1e-6) if case["peer"] == "verl" else 1.0
        torch.testing.assert_close((grpo.advantages(rewards) * epsilon).flatten(), A, atol=1e-5, rtol=0)


def test_advantages_by_hand():
    """Stops a biased std, groups that mix, and a division by zero in a group without spread."""
    got = grpo.advantages(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [-3.0, -3.0, -3.0, 1.0]]))
    a, b = 1 / (math.sqrt(5 / 3) + 1e-4), 1 / (2 + 1e-4)
    expected = torch.tensor([[-1.5 * a, -0.5 * a, 0.5 * a, 1.5 * a], [0.0] * 4, [-b, -b, -b, 3 * b]])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    for case in GOLDEN["advantages"]:
        rewards = torch.tensor(case["rewards"]).view(-1, case["num_generations"])
        theirs = torch.tensor(case["trl_group"])
        torch.testing.assert_close(grpo.advantages(rewards).flatten(), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "A, ratio, value, slope",
    [(1, 0.5, 0.5, 1), (1, 1.0, 1, 1), (1, 1.5, 1.2, 0), (-1, 0.5, -0.8, 0), (-1, 1.0, -1, -1), (-1, 1.5, -1.5, -1)],
)
def test_clip_acts_on_the_right_side(A, ratio, value, slope):
    """Stops a clip that is inverted for negative advantages; value and d J / d ratio by hand."""
    rho = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    J = grpo.objective(rho.log(), torch.zeros(1, 1), None, torch.tensor([float(A)]), 0.2, 0.2, 0)
    assert J.item() == pytest.approx(value) and torch.autograd.grad(J, rho)[0].item() == pytest.approx(slope)


def test_kl_pulls_towards_the_reference():
    """Stops a KL term without gradient on policy, such as mean(new - ref), and a negative or misplaced one."""
    new = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    ref, step = torch.tensor([[-1.5, -1.0, -0.5]], dtype=torch.float64), 1e-6
    term = lambda x: grpo.objective(x, x.detach(), ref, torch.zeros(1), beta=0.5)
    gradient = torch.autograd.grad(term(new).sum(), new)[0]
    with torch.no_grad():
        assert (term(new) <= 0).all()
        torch.testing.assert_close(gradient, (term(new + step) - term(new - step)) / (2 * step), atol=1e-8, rtol=0)
    assert torch.equal(gradient.sign(), (ref - new).sign())


def test_token_weights_by_hand():
    """Stops a mean over the wrong tokens: every completion counts 1/N, each of its tokens alike, EOS included."""
    weights = grpo.token_weights(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool())
    expected = torch.tensor([[1 / 9, 1 / 9, 1 / 9, 0], [1 / 3, 0, 0, 0], [1 / 12] * 4])
    torch.testing.assert_close(weights, expected, check_dtype=False)


# ------------------------------------------------------------------------- one update


def policy(dropout=0.0):
    """A small model with a DoRA that has moved."""
    model = dora.add_dora(random_model("qwen2"), 4, 4.0, dropout, "q_proj,v_proj,down_proj")
    with torch.no_grad():
        for layer in dora.dora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    return model


def row_logps(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor([ids]).T)[:, 0]


def ragged(model, off_policy=True):
    """Eight completions of 1 to 7 tokens; old and reference log-probabilities far enough off for the clip to act."""
    torch.manual_seed(2)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 2, 6, 3, 5, 1])[:, None]
    prompts = [list(range(5, 7 + n)) for n in (3, 3, 9, 9, 1, 1, 5, 5)]
    batch = recode.Batch(prompts, torch.randint(4, 97, (8, 7)) * mask, mask, torch.randn(8))
    now = recode.batch_logps(model, batch, grpo.Config())
    batch.ref_logps = (now + torch.randn(8, 7)) * mask
    batch.old_logps = (now + 0.3 * torch.randn(8, 7)) * mask if off_policy else None
    return batch


def brute_force(model, batch, config):
    """The loss, its gradient and the figures, one row at a time from its full logits."""
    model.zero_grad()
    loss, clipped, kl, count = 0.0, 0, 0.0, batch.mask.sum().item()
    for i, prompt in enumerate(batch.prompts):
        ids = batch.tokens[i][batch.mask[i]].tolist()
        logps, A, row = row_logps(model, prompt, ids), batch.advantages[i], 0.0
        for t, logp in enumerate(logps):
            rho = torch.exp(logp - (logp.detach() if batch.old_logps is None else batch.old_logps[i, t]))
            bounded = rho.clamp(1 - config.clip_low, 1 + config.clip_high)
            d = batch.ref_logps[i, t] - logp
            row += min(rho * A, bounded * A) - config.beta * (d.exp() - d - 1)
            clipped += bool(bounded * A < rho * A)
            kl += (d.exp() - d - 1).item() / count
        loss -= row / len(ids) / len(batch.prompts)
    loss.backward()
    return {"loss": loss.item(), "clip_fraction": clipped / count, "kl": kl}, gradients(model)


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["off policy", "on policy", "checkpointed"])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(kind):
    """Stops means taken per micro-batch, and a logged loss that is the last micro-batch's."""
    model = policy()
    batch = ragged(model, off_policy=kind != "on policy")
    wanted, exact = brute_force(model, batch, grpo.Config(beta=0.1))
    assert (wanted["clip_fraction"] > 0.1) == (kind != "on policy")
    if kind == "checkpointed":
        model.gradient_checkpointing_enable()
    for size in (8, 1, 2, 3):
        model.zero_grad()
        figures = grpo.accumulate(model, batch, grpo.Config(beta=0.1, micro_batch=size))
        assert {name: figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
        for got, expected in zip(gradients(model), exact, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        if size == 8:
            whole, first = dict(figures), gradients(model)
        assert figures == pytest.approx(whole, abs=1e-6)
        for got, expected in zip(gradients(model), first, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_on_policy_the_ratio_is_one():
    """Stops old log-probabilities that come from elsewhere (dropout, the sampler) when one update follows a rollout."""
    model = policy(dropout=0.5)
    batch = ragged(model, off_policy=False)
    figures = grpo.accumulate(model, batch, grpo.Config(beta=0, clip_low=1e-7, clip_high=1e-7, micro_batch=3))
    assert model.training and figures["clip_fraction"] == 0
    assert figures["loss"] == pytest.approx(-batch.advantages.mean().item(), abs=1e-6)
    assert all(g.abs().sum() > 0 for g in gradients(model))


def test_old_and_reference_logps_are_without_dropout():
    """Stops dropout in the passes that only measure."""
    model = policy(dropout=0.5)
    batch, config = ragged(model), grpo.Config(micro_batch=3)
    first = recode.batch_logps(model.train(), batch, config)
    assert torch.equal(first, recode.batch_logps(model.train(), batch, config)) and not first.requires_grad
    for i, prompt in enumerate(batch.prompts):
        expected = row_logps(model.eval(), prompt, batch.tokens[i][batch.mask[i]].tolist())
        torch.testing.assert_close(first[i][batch.mask[i]], expected.detach(), atol=1e-5, rtol=0)


def test_second_update_compares_with_the_policy_that_sampled(monkeypatch):
    """Stops old log-probabilities taken anew before every update of a rollout: the clip would never act."""
    model, seen, real = policy(), [], grpo.accumulate
    batch, config = ragged(model, off_policy=False), grpo.Config(beta=0.1, updates=2, prompts_per_step=4, micro_batch=3)
    before = recode.batch_logps(model, batch, config)
    with dora.reference(model):
        reference = recode.batch_logps(model, batch, config)
    monkeypatch.setattr(grpo, "accumulate", lambda *args: seen.append((args[1], real(*args))) or seen[-1][1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    figures = grpo.update(model, optimizer, batch, config)
    assert len(seen) == 2 and seen[0][1]["clip_fraction"] == 0 and seen[1][1]["clip_fraction"] > 0
    for rows, (part, _) in zip((slice(0, 4), slice(4, 8)), seen):
        assert torch.equal(part.old_logps, before[rows]) and torch.equal(part.ref_logps, reference[rows])
        assert torch.equal(part.tokens, batch.tokens[rows]) and part.prompts == batch.prompts[rows]
    for name in ("loss", "kl", "clip_fraction"):
        assert figures[name] == pytest.approx((seen[0][1][name] + seen[1][1][name]) / 2)


def test_only_the_update_that_is_not_finite_is_skipped(monkeypatch):
    """Stops one lost mini-batch from taking the sound ones after it along, or from moving the weights."""
    model = policy()
    batch, config = ragged(model, off_policy=False), grpo.Config(beta=0, updates=4, prompts_per_step=4)
    batch.advantages[2] = math.nan
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    steps, real = [], optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: steps.append(gradients(model)) or real())
    figures = grpo.update(model, optimizer, batch, config)
    assert len(steps) == 3 and figures["skipped"] > 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_collect_keeps_equal_prompts_apart(checkpoints, tokenizer, monkeypatch):
    """Stops equal prompts that merge into one group, and a group without spread that still pushes."""
    model = recode.load_model(checkpoints["qwen2"])
    a, b = (([5, 6, 7, n], data.Example("lib", "2.0", "", f"note {n}", "a = 1", f"a = {n}")) for n in (8, 9))
    scores, asked = iter([1.0, 2.0, 3.0, 6.0, 2.0, 2.0, 2.0, 2.0, 7.0, 7.0, 7.0, 4.0]), []
    monkeypatch.setattr(reward, "score", lambda text, target, _: asked.append(target) or next(scores))
    monkeypatch.setattr(recode, "eos_ids", lambda *_: list(range(0, 600, 5)))
    config = grpo.Config(prompts_per_step=3, num_samples=4, max_new_tokens=8)
    batch, figures, samples, position = grpo.collect(model, tokenizer, [a, b, a], 3, config, seed=1)
    expected = grpo.advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0], [2.0] * 4, [7.0, 7.0, 7.0, 4.0]])).flatten()
    assert torch.equal(batch.advantages, expected) and not batch.advantages[4:8].any() and batch.advantages[3] > 1
    assert figures["no_spread"] == pytest.approx(1 / 3) and figures["reward"] == 3.75 and position == 6
    rows = [task for task in data.draw([a, b, a], 3, 3, config.seed) for _ in range(4)]
    assert batch.prompts == [prompt for prompt, _ in rows] and asked == [example.new_code for _, example in rows]
    assert [sample["update_info"] for sample in samples] == [example.update_info for _, example in rows]
    last = batch.tokens[torch.arange(12), batch.mask.sum(1) - 1]
    ended = last % 5 == 0
    assert figures["truncated"] == pytest.approx(1 - ended.float().mean().item())
    assert (batch.mask.sum(1) == 8)[~ended].all()
    assert figures["completion_length"] == batch.mask.sum().item() / 12 and ended.any()


# ------------------------------------------------------------------------- stop and go on


def score(completion, *_):
    """A reward that differs between the answers of a random model."""
    return zlib.crc32(completion.encode()) % 7 - 3.0


@pytest.fixture
def flags(checkpoints, write_rows, rows, tmp_path, monkeypatch):
    """flags(name, *more) is the command line of a short run in tmp_path/name; rewards come from score()."""
    monkeypatch.setattr(reward, "score", score)
    settings = (
        f"--model {checkpoints['qwen2']} --data {write_rows(rows)} --steps 6 --save-every 2 --prompts-per-step 2 "
        "--num-samples 4 --max-new-tokens 8 --updates 2 --micro-batch 3 --r 4 --dropout 0.1 --beta 0.01 --lr 0.01 "
        "--warmup 0.3 --show-every 2 --heldout 0.34"
    )
    return lambda name, *more: [*settings.split(), "--output", str(tmp_path / name), *more]


def leavings(path):
    """What a run leaves, but for clock times: checkpoint, metrics, samples and adapter."""
    saved = torch.load(path / "checkpoint" / "state.pt", weights_only=True)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    adapter = (path / "adapter" / "adapter_model.safetensors").read_bytes()
    del saved["files"]
    return {"saved": saved, "metrics": metrics, "samples": (path / "samples.jsonl").read_text(), "adapter": adapter}


def same(left, right):
    """Whether two nested structures are equal bit for bit."""
    (a, shape), (b, other) = tree_flatten(left), tree_flatten(right)
    return shape == other and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


def test_resume_is_as_if_nothing_had_happened(flags, tmp_path, monkeypatch, capsys):
    """Stops a resume that repeats a batch, forgets the optimizer, or leaves a gap or a repeat in the logs."""
    drawn, draw, log = [], data.draw, run.Run.log
    monkeypatch.setattr(data, "draw", lambda tasks, at, *rest: drawn.append(at) or draw(tasks, at, *rest))
    assert grpo.main(flags("straight")) == 0
    straight = leavings(tmp_path / "straight")
    assert [row["step"] for row in straight["metrics"]] == [1, 2, 3, 4, 5, 6] and drawn == [0, 2, 4, 6, 8, 10]
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in straight["metrics"])

    def until(last, end):
        """From here on `end` is called when step `last` has been logged."""
        logged = lambda self, row, samples: (log(self, row, samples), row["step"] == last and end())
        monkeypatch.setattr(run.Run, "log", logged)

    until(3, lambda: signal.raise_signal(signal.SIGINT))
    assert grpo.main(flags("stopped")) == 130 and "--resume" in capsys.readouterr().out
    assert leavings(tmp_path / "stopped")["saved"]["state"]["step"] == 3
    assert grpo.main(flags("stopped", "--resume")) == 0 and drawn == [0, 2, 4, 6, 8, 10] * 2
    until(5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.main(flags("crashed"))
    assert len((tmp_path / "crashed" / "metrics.jsonl").read_text().splitlines()) == 5
    until(0, None)
    assert grpo.main(flags("crashed", "--resume")) == 0
    assert same(leavings(tmp_path / "stopped"), straight) and same(leavings(tmp_path / "crashed"), straight)


def die_while_saving(patch, moment, die):
    """Have os.fsync or os.replace, whichever `moment` names, call die() when the checkpoint of step 4 is written."""
    real = run.write

    def write(target, content):
        with patch.context() as inner:
            if target.name == "state.pt" and torch.load(io.BytesIO(content))["state"]["step"] == 4:
                inner.setattr(os, moment, die)
            real(target, content)

    patch.setattr(run, "write", write)


def killed(flags):
    """A training process that ends itself by kill -9 in the middle of a save."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reward, "score", score)
    die_while_saving(patch, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    grpo.main(flags)


@pytest.mark.parametrize("moment", ["fsync", "replace", "disk full", "kill -9"])
def test_death_in_the_middle_of_a_save(moment, flags, tmp_path, monkeypatch):
    """Stops a save that harms the last checkpoint when the process dies, or the disk is full, while it writes."""

    def die(*_):
        raise OSError(errno.ENOSPC, "no space") if moment == "disk full" else KeyboardInterrupt

    if moment == "kill -9":
        process = multiprocessing.get_context("spawn").Process(target=killed, args=(flags("run"),))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch, pytest.raises((data.BadInput, KeyboardInterrupt)):
            die_while_saving(patch, "replace" if moment == "replace" else "fsync", die)
            grpo.main(flags("run"))
    assert leavings(tmp_path / "run")["saved"]["state"]["step"] == 2
    assert bool(list(tmp_path.rglob("*.tmp"))) == (moment != "disk full")
    assert grpo.main(flags("run", "--resume")) == 0
    assert [row["step"] for row in leavings(tmp_path / "run")["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.rglob("*.tmp"))


def test_random_rewards_run(flags, tmp_path, monkeypatch):
    """Stops a loss or gradient that is not finite when rewards carry no information: the control of every claim."""
    chance = random.Random(0)
    monkeypatch.setattr(reward, "score", lambda *_: chance.uniform(-3, 3))
    assert grpo.main(flags("random")) == 0
    rows = leavings(tmp_path / "random")["metrics"]
    assert len(rows) == 6 and all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in rows)
