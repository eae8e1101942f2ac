"""What the three scripts share: one update against brute force, in any micro-batches; resuming."""

import errno
import importlib
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
from conftest import SCRIPTS, TWINS, random_model
from torch.utils._pytree import tree_flatten

import dapo
import data
import dora
import grpo
import rollout
import reward
from training import run
import sft

# ------------------------------------------------------------------------- one update


def policy(dropout=0.0):
    """A small model with a DoRA adapter that has moved."""
    model = dora.add_dora(random_model("qwen2"), 4, 4.0, dropout, "q_proj,v_proj,down_proj")
    with torch.no_grad():
        for layer in dora.dora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    return model


def row_logps(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor([ids]).T)[:, 0]


def ragged(model, off_policy=True):
    """Eight completions of 1 to 7 tokens; old and reference log-probabilities make the clip act."""
    torch.manual_seed(2)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 2, 6, 3, 5, 1])[:, None]
    prompts = [list(range(5, 7 + n)) for n in (3, 9, 1, 5)]
    batch = rollout.Batch(
        prompts, torch.arange(8) // 2, torch.randint(4, 97, (8, 7)) * mask, mask, torch.randn(8)
    )
    now = rollout.batch_logps(model, batch, grpo.Config())
    batch.ref_logps = (now + torch.randn(8, 7)) * mask
    batch.old_logps = (now + 0.3 * torch.randn(8, 7)) * mask if off_policy else None
    return batch


def brute_force(script, model, batch, config):
    """The loss, its gradient and the metrics, one row at a time from full logits."""
    model.zero_grad()
    loss, clipped, kl, count = 0.0, 0, 0.0, batch.mask.sum().item()
    for i in range(len(batch.mask)):
        ids = batch.tokens[i][batch.mask[i]].tolist()
        logps, A, row = (
            row_logps(model, batch.prompts[batch.group[i]], ids),
            batch.advantages[i],
            0.0,
        )
        for t, logp in enumerate(logps):
            rho = torch.exp(
                logp - (logp.detach() if batch.old_logps is None else batch.old_logps[i, t])
            )
            surrogate = logp * A
            if script is not sft:
                surrogate = min(rho * A, rho.clamp(1 - config.clip_low, 1 + config.clip_high) * A)
                if script is dapo and A < 0 and surrogate < 10 * A:
                    surrogate = 10 * A
                clipped += bool(surrogate != rho * A)
                d = batch.ref_logps[i, t] - logp
                surrogate = surrogate - config.beta * (d.exp() - d - 1)
                kl += (d.exp() - d - 1).item() / count
            row += surrogate
        loss -= row / len(ids) / len(batch.mask) if script is grpo else row / count
    loss.backward()
    sums = {"loss": loss.item(), "clip_fraction": clipped / count, "kl": kl}
    if script is sft:  # no ratio, no reference
        del sums["clip_fraction"], sums["kl"]
    return sums, gradients(model)


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["off policy", "on policy", "checkpointed"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(script, kind):
    """Stops means taken per micro-batch, and a logged loss that is only the last micro-batch's."""
    model = policy()
    batch = ragged(model, off_policy=kind != "on policy")
    if script is dapo and kind != "on policy":
        batch.advantages[1], batch.old_logps[1, 0] = (
            -1.0,
            batch.old_logps[1, 0] - 4,
        )  # the dual clip acts
    beta = {} if script is sft else {"beta": 0.1}
    config = lambda size: script.Config(**beta, micro_tokens=size)
    wanted, exact = brute_force(script, model, batch, config(1))
    assert (wanted.get("clip_fraction", 0) > 0.1) == (kind != "on policy" and script is not sft)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable()
    for size in (1000, 1, 8, 15):
        model.zero_grad()
        metrics = script.accumulate(model, batch, config(size))
        assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
        for got, expected in zip(gradients(model), exact, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        if size == 1000:
            whole, first = dict(metrics), gradients(model)
        assert metrics == pytest.approx(whole, abs=1e-6)
        for got, expected in zip(gradients(model), first, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("script", [grpo, dapo])
def test_on_policy_the_ratio_is_one(script):
    """Stops old log-probabilities with dropout or from the sampler; with one update rho is 1."""
    model = policy(dropout=0.5)
    batch = ragged(model, off_policy=False)
    metrics = script.accumulate(
        model, batch, script.Config(beta=0, clip_low=1e-7, clip_high=1e-7, micro_tokens=9)
    )
    assert model.training and metrics["clip_fraction"] == 0
    mean = (
        (script.token_weights(batch.mask, script.Config()).sum(1) * batch.advantages).sum().item()
    )
    assert metrics["loss"] == pytest.approx(-mean, abs=1e-6)
    assert all(g.abs().sum() > 0 for g in gradients(model))


def test_old_and_reference_logps_are_without_dropout():
    """Stops dropout in the passes that only measure."""
    model = policy(dropout=0.5)
    batch, config = ragged(model), grpo.Config(micro_tokens=9)
    first = rollout.batch_logps(model.train(), batch, config)
    assert (
        torch.equal(first, rollout.batch_logps(model.train(), batch, config))
        and not first.requires_grad
    )
    for i, prompt in enumerate(batch.group.tolist()):
        expected = row_logps(
            model.eval(), batch.prompts[prompt], batch.tokens[i][batch.mask[i]].tolist()
        )
        torch.testing.assert_close(first[i][batch.mask[i]], expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", [grpo, dapo])
def test_second_update_compares_with_the_policy_that_sampled(script, monkeypatch):
    """Stops recomputing old log-probabilities before every update: the clip would never act."""
    model, seen, real = policy(), [], script.accumulate
    config = script.Config(beta=0.1, updates=2, prompts_per_step=4, num_samples=2, micro_tokens=9)
    batch = ragged(model, off_policy=False)
    before = rollout.batch_logps(model, batch, config)
    with dora.reference(model):
        reference = rollout.batch_logps(model, batch, config)
    monkeypatch.setattr(
        script, "accumulate", lambda *args: seen.append((args[1], real(*args))) or seen[-1][1]
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    metrics = script.update(model, optimizer, batch, config)
    assert len(seen) == 2 and seen[0][1]["clip_fraction"] == 0 and seen[1][1]["clip_fraction"] > 0
    for rows, (part, _) in zip((slice(0, 4), slice(4, 8)), seen):
        assert torch.equal(part.old_logps, before[rows]) and torch.equal(
            part.ref_logps, reference[rows]
        )
        assert (
            torch.equal(part.tokens, batch.tokens[rows])
            and part.prompts == batch.prompts[rows.start // 2 : rows.stop // 2]
        )
    for name in ("loss", "kl", "clip_fraction"):
        assert metrics[name] == pytest.approx((seen[0][1][name] + seen[1][1][name]) / 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_the_nonfinite_update_is_skipped(script, monkeypatch):
    """Stops one non-finite mini-batch from moving the weights or skipping the finite ones."""
    model = policy()
    sampled = {} if script is sft else {"beta": 0, "num_samples": 2}
    config = script.Config(**sampled, updates=4, prompts_per_step=4)
    batch = ragged(model, off_policy=False)
    batch.advantages[2] = math.nan
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    steps, real = [], optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: steps.append(gradients(model)) or real())
    metrics = script.update(model, optimizer, batch, config)
    assert len(steps) == 3 and metrics["skipped"] == 1 / 4
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------- stop and resume


def score(grade, *_):
    """A reward that differs between a random model's answers."""
    return zlib.crc32(grade.completion.encode()) % 7 - 3.0


@pytest.fixture(params=TWINS)
def script(request):
    return request.param


@pytest.fixture
def flags(script, checkpoints, write_rows, rows, tmp_path, monkeypatch):
    """flags(name, *more) is the command line of a short run in tmp_path/name, with score()."""
    monkeypatch.setattr(reward, "total", score)
    settings = (
        f"--model {checkpoints['qwen2']} --data {write_rows(rows)} --steps 6 --save-every 2 "
        "--prompts-per-step 2 --max-new-tokens 8 --updates 2 --micro-tokens 60 "
        "--r 4 --dropout 0.1 --lr 0.01 --warmup 0.3 --show-every 2 --heldout 0.34"
    )
    if script is not sft:
        settings += " --num-samples 4 --beta 0.01"
    if script is dapo:
        settings += " --max-tries 2 --overlong-cache 4"
    return lambda name, *more: [*settings.split(), "--output", str(tmp_path / name), *more]


def artifacts(path):
    """What a run leaves on disk, without clock times: checkpoint, metrics, samples and adapter."""
    saved = torch.load(path / "checkpoint" / "state.pt", weights_only=True)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    adapter = (path / "adapter" / "adapter_model.safetensors").read_bytes()
    del saved["files"]
    return {
        "saved": saved,
        "metrics": metrics,
        "samples": (path / "samples.jsonl").read_text(),
        "adapter": adapter,
    }


def same(left, right):
    """Whether two nested structures are equal, bit for bit."""
    (a, shape), (b, other) = tree_flatten(left), tree_flatten(right)
    return shape == other and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b)
    )


def test_resume_equals_an_uninterrupted_run(script, flags, tmp_path, monkeypatch, capsys):
    """Stops a resume that repeats a batch, forgets the optimizer, or leaves a gap in the logs."""
    drawn, draw, log = [], data.draw, run.RunDirectory.log
    monkeypatch.setattr(
        data, "draw", lambda tasks, at, *rest: drawn.append(at) or draw(tasks, at, *rest)
    )
    assert script.main(flags("straight")) == 0
    straight = artifacts(tmp_path / "straight")
    assert [row["step"] for row in straight["metrics"]] == [1, 2, 3, 4, 5, 6]
    once = list(drawn)
    assert (
        once == [0, 2, 4, 6, 8, 10]
        if script is not dapo
        else once == sorted(set(once)) and len(once) >= 6
    )
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in straight["metrics"])

    def until(last, end):
        """From now on, call `end` once step `last` has been logged."""
        logged = lambda self, step, *rest: (log(self, step, *rest), step == last and end())
        monkeypatch.setattr(run.RunDirectory, "log", logged)

    until(3, lambda: signal.raise_signal(signal.SIGINT))
    assert script.main(flags("stopped")) == 130 and "--resume" in capsys.readouterr().out
    assert artifacts(tmp_path / "stopped")["saved"]["state"]["step"] == 3
    assert script.main(flags("stopped", "--resume")) == 0 and drawn == once * 2
    until(5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(flags("crashed"))
    assert len((tmp_path / "crashed" / "metrics.jsonl").read_text().splitlines()) == 5
    until(0, None)
    assert script.main(flags("crashed", "--resume")) == 0
    assert same(artifacts(tmp_path / "stopped"), straight) and same(
        artifacts(tmp_path / "crashed"), straight
    )


def die_while_saving(patch, moment, die):
    """Make os.fsync or os.replace (`moment`) call die() while step 4's checkpoint is written."""
    real = run.write

    def step_of(content):
        content(file := io.BytesIO())
        file.seek(0)
        return torch.load(file)["state"]["step"]

    def write(target, content):
        with patch.context() as inner:
            if target.name == "state.pt" and step_of(content) == 4:
                inner.setattr(os, moment, die)
            real(target, content)

    patch.setattr(run, "write", write)


def killed(name, flags):
    """The body of a training process that kills itself (kill -9) in the middle of a save."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reward, "total", score)
    die_while_saving(patch, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    importlib.import_module(name).main(flags)


@pytest.mark.parametrize(
    "script, moment",
    [
        *((grpo, moment) for moment in ("fsync", "replace", "disk full", "kill -9")),
        pytest.param(dapo, "kill -9", marks=pytest.mark.slow),
        pytest.param(sft, "kill -9", marks=pytest.mark.slow),
    ],
)
def test_death_in_the_middle_of_a_save(moment, script, flags, tmp_path, monkeypatch):
    """Stops a kill or a full disk during a save from damaging the checkpoint before it."""

    def die(*_):
        raise OSError(errno.ENOSPC, "no space") if moment == "disk full" else KeyboardInterrupt

    if moment == "kill -9":
        process = multiprocessing.get_context("spawn").Process(
            target=killed, args=(script.__name__, flags("run"))
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch, pytest.raises((data.BadInput, KeyboardInterrupt)):
            die_while_saving(patch, "replace" if moment == "replace" else "fsync", die)
            script.main(flags("run"))
    assert artifacts(tmp_path / "run")["saved"]["state"]["step"] == 2
    assert bool(list(tmp_path.rglob("*.tmp"))) == (moment != "disk full")
    assert script.main(flags("run", "--resume")) == 0
    assert [row["step"] for row in artifacts(tmp_path / "run")["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.rglob("*.tmp"))


def test_random_rewards_run(script, flags, tmp_path, monkeypatch):
    """Stops a non-finite loss or gradient under random rewards, the control of every experiment."""
    rng = random.Random(0)
    monkeypatch.setattr(reward, "total", lambda *_: rng.uniform(-3, 3))
    assert script.main(flags("random")) == 0
    rows = artifacts(tmp_path / "random")["metrics"]
    assert len(rows) == 6 and all(
        math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in rows
    )
