"""lib/parallel.py: two ranks (gloo) give the results of one process, for every algorithm.

A rank that fails ends the job.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, ROWS, random_model
from test_update import brute_force, policy, ragged, same, score

import dapo
import data
import grpo
from lib import fsdp, parallel
import recode
import reward
from training import run
import sft
from lib import loading
import lib.config

CASES = [(script, adapter) for script in (grpo, dapo, sft) for adapter in ("dora", "none")]
NAMES = [f"{script.__name__}-{adapter}" for script, adapter in CASES]
RESUMED = ("grpo-dora", "dapo-none")  # also stopped after step 2 and resumed
every_case = pytest.mark.parametrize("name", NAMES)


def one_update(name, groups):
    """Script, model, batch (`groups` groups of two rows of different length), Config of a case."""
    script, adapter = CASES[NAMES.index(name)]
    model = policy() if adapter == "dora" else random_model("qwen2", tie_word_embeddings=True)
    batch = ragged(model).select(torch.arange(2 * groups))
    beta = {} if script is sft else {"beta": 0.1}
    config = script.Config(**beta, micro_tokens=9, adapter=adapter, max_grad_norm=1e9)
    return script, model, batch, config


def gradient_of_ranks(name, groups):
    """Metrics, full gradients and gradient norm after a reduce over all ranks."""
    script, model, batch, config = one_update(name, groups)
    if config.adapter == "none":
        fsdp.shard(model)
    sums = parallel.sum_metrics(script.accumulate(model, batch, config))
    parallel.reduce_gradients(model)
    norm = parallel.clip_grad_norm(model, 1e9)
    return (
        dict(sums),
        [parallel.full_tensor(p.grad) for p in model.parameters() if p.requires_grad],
        norm,
    )


def train(base, name, output, *more, stop=None):
    """A run of four steps in base/output; returns the exit status.

    stop=(rank, step): that rank gets a Ctrl-C after that step.
    """
    script, adapter = CASES[NAMES.index(name)]
    log, flags = run.RunDirectory.log, (
        f"--model {base}/model --data {base}/data.jsonl --output {base}/{output} "
        f"--adapter {adapter} --steps 4 --save-every 2 --prompts-per-step 3 "
        "--max-new-tokens 8 --micro-tokens 60 --r 4 --lr 0.01 --dropout 0 --warmup 0.3 "
        "--show-every 2 --heldout 0.34 --weight-decay 0.1"
    )  # fmt: skip
    if adapter == "none":
        flags += " --no-keep-activations"  # recomputed through the hooks of shards
    if script is not sft:
        flags += " --num-samples 4"
        flags += " --beta 0" if adapter == "none" else " --beta 0.01"
    if script is dapo:
        flags += " --max-tries 2 --updates 3"

    def logged(self, step, *rest):
        log(self, step, *rest)
        if (parallel.RANK, step) == stop:
            signal.raise_signal(signal.SIGINT)

    with patch.object(reward, "total", score), patch.object(run.RunDirectory, "log", logged):
        return script.main([*flags.split(), *more])


def accumulate_all(base):
    """What both ranks run for the gradients: one job, because starting one takes seconds."""
    parallel.start()
    found = {(name, groups): gradient_of_ranks(name, groups) for name in NAMES for groups in (3, 1)}
    torch.save(found, base / f"rank{parallel.RANK}.pt")
    torch.distributed.destroy_process_group()


def train_all(base):
    """What both ranks run for the runs."""
    parallel.start()
    for name in NAMES:
        assert train(base, name, f"{name}-2") == 0
    for name in RESUMED:
        assert train(base, name, f"{name}-stopped", stop=(1, 2)) == 130
        if parallel.RANK == 0:
            shutil.copytree(base / f"{name}-stopped", base / f"{name}-2to1")
        parallel.barrier()
        assert train(base, name, f"{name}-stopped", "--resume") == 0
        assert train(base, name, f"{name}-1to2", "--resume") == 0
    torch.distributed.destroy_process_group()


def environment():
    """environment(rank) is what torchrun would set for a rank of two on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return lambda rank: {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def run_ranks(job, base):
    """Run job(base) on two ranks, and wait for them."""
    processes, settings = [], environment()
    for rank in range(2):
        with patch.dict(os.environ, settings(rank)):
            processes.append(multiprocessing.get_context("spawn").Process(target=job, args=(base,)))
            processes[-1].start()
    for process in processes:
        process.join(600)
        process.kill()  # if one still waits for the other
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """A directory with the gradients of two ranks."""
    base = tmp_path_factory.mktemp("gradients")
    run_ranks(accumulate_all, base)
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory, checkpoints):
    """A directory with all runs, those of one process and those of two ranks."""
    base = tmp_path_factory.mktemp("ranks")
    shutil.copytree(checkpoints["qwen2"], base / "model")
    (base / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name in NAMES:
        assert train(base, name, f"{name}-1") == 0
    for name in RESUMED:
        assert train(base, name, f"{name}-1to2", stop=(0, 2)) == 130
    run_ranks(train_all, base)
    return base


def artifacts(path):
    """A run's metrics without clock times, its samples, its checkpoint."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    saved = torch.load(path / "checkpoint" / "state.pt", weights_only=True)
    del saved["files"]
    return (
        rows,
        [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()],
        saved,
    )


def take_logps(samples):
    """Remove the log-probabilities of all tokens from the samples; returns them, a list."""
    found = []
    for sample in samples:
        for token in sample.get("tokens", []):
            found += token[1:]
            del token[1:]
    return found


def assert_same_run(one, other):
    """Check that two runs have the same samples and, to rounding, the same numbers."""
    (rows, samples, _), (others, also, _) = artifacts(one), artifacts(other)
    assert take_logps(samples) == pytest.approx(take_logps(also), abs=2e-4)
    assert samples == also and len(rows) == len(others) == 4
    for row, wanted in zip(rows, others):
        assert row == pytest.approx(wanted, abs=1e-5)
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)


# ------------------------------------------------------------------------- the same as one process


@pytest.mark.parametrize("groups", [3, 1])
@every_case
def test_gradient_equals_that_of_one_process(name, groups, gradients):
    """Stops weights normalised per rank, gradients averaged, not summed, and rows done twice."""
    wanted, exact = brute_force(*one_update(name, groups))
    length = math.sqrt(sum(grad.square().sum().item() for grad in exact))
    for rank in range(2):
        sums, grads, norm = torch.load(gradients / f"rank{rank}.pt")[name, groups]
        assert {key: sums[key] for key in wanted} == pytest.approx(wanted, abs=1e-5)
        assert norm == pytest.approx(length, rel=1e-5)
        for got, expected in zip(grads, exact, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@every_case
def test_run_equals_that_of_one_process(name, base):
    """Stops samples that depend on the rank, groups out of order, steps that differ by rank."""
    assert_same_run(base / f"{name}-2", base / f"{name}-1")


@pytest.mark.slow
def test_all_weights_are_exported(base, tokenizer):
    """Stops an exported model/ that is one shard, or that is not what was trained."""
    for name in ("dapo-none-1", "dapo-none-2"):
        model, saved = loading.load_model(str(base / name / "model")), artifacts(base / name)[2]
        trained = dict(model.named_parameters())
        assert trained.keys() == saved["trained"].keys()
        assert all(torch.equal(trained[key], x) for key, x in saved["trained"].items())
    assert not (base / "dapo-dora-2" / "model").exists()


# ------------------------------------------------------------------------- stop and resume


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_two_ranks_resume_exactly(name, base):
    """Stops a Ctrl-C that only one rank obeys, and shards restored in the wrong place."""
    assert same(artifacts(base / f"{name}-stopped"), artifacts(base / f"{name}-2"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_the_number_of_ranks_may_change(name, base):
    """Stops a checkpoint that only as many ranks as wrote it can read."""
    assert_same_run(base / f"{name}-1to2", base / f"{name}-1")
    script, adapter = CASES[NAMES.index(name)]
    saved = artifacts(base / f"{name}-2to1")[2]
    assert saved["state"]["step"] == 2
    model = policy() if adapter == "dora" else loading.load_model(str(base / "model"))
    if adapter == "none":
        fsdp.shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        parallel.load_state(
            model, optimizer, torch.load(base / f"{name}-2to1" / "checkpoint" / "state.pt")
        )
        loaded = parallel.full_state(model, optimizer)
        assert same(loaded, {key: saved[key] for key in loaded})
        assert all(
            torch.equal(parallel.full_tensor(p), saved["trained"][key])
            for key, p in model.named_parameters()
        )
    assert train(base, name, f"{name}-2to1", "--resume") == 0
    assert_same_run(base / f"{name}-2to1", base / f"{name}-1")


def test_small_steps_are_not_rounded_away():
    """Stops training bf16 weights: a step of 1e-4 is smaller than the last bit of 1.0."""
    model = random_model("qwen2").bfloat16()
    fsdp.shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    for _ in range(20):
        fsdp.gather_weights(model)
        assert model.dtype == torch.bfloat16
        model.model.norm.weight.sum().backward()
        parallel.reduce_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    norm = parallel.full_tensor(model.model.norm.weight.detach())
    torch.testing.assert_close(norm, torch.full_like(norm, 0.998), atol=1e-5, rtol=0)


def test_a_graph_is_captured_without_fsdp(monkeypatch, capsys):
    """Stops FSDP2's hooks from running during capture: they fork streams, and the capture fails.

    The stand-in for the capture frees a layer's weights; a hook would gather them again.
    """
    model = random_model("qwen2")
    fsdp.shard(model)

    def capture(step):
        model.model.layers[0].reshard()
        with pytest.raises(RuntimeError, match="DTensor"):
            step()
        fsdp.gather_weights(model)
        return lambda: None, step()

    monkeypatch.setattr("lib.speed.capture", capture)
    monkeypatch.setattr(parallel, "CUDA", True)
    fsdp.gather_weights(model)
    recode.sample(model, [[5, 6, 7]], 2, 1, [3])
    assert not capsys.readouterr().err
    fsdp.free_weights(model)
    model(torch.tensor([[5, 6]]))  # the hooks are back


# ------------------------------------------------------------------------- refusals and failures


@pytest.mark.parametrize(
    "flags, world, word",
    [
        ("--adapter none --beta 0.1", 1, "--beta 0"),
        ("--adapter qlora", 1, "--adapter 'qlora'"),
        ("--prompts-per-step 3", 4, "--prompts-per-step 3"),
    ],
)
def test_refused(flags, world, word, monkeypatch):
    """Stops a KL penalty to a policy that no longer exists, and ranks with nothing to do."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(data.BadInput, match=word):
        lib.config.parse_config(grpo.Config, flags.split(), "")


@pytest.fixture(scope="module")
def ends(base):
    """{how: (exit status, stderr of torchrun and its ranks)} of jobs that fail."""
    jobs = {}
    for how in ("killed", "own error", "same error"):
        settings = {
            name: environment()(0)[name]
            for name in ("MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        }
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
        ]
        command += [settings["MASTER_PORT"], __file__, how, str(base)]
        jobs[how] = subprocess.Popen(
            command, env=os.environ | settings, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
    try:
        return {
            how: (job.communicate(timeout=300)[1], job.returncode)[::-1]
            for how, job in jobs.items()
        }
    finally:
        for job in jobs.values():
            job.kill()


def fail(how, base):
    """What each rank of a failing job runs; `how` names the failure."""
    log = run.RunDirectory.log

    def logged(self, step, *rest):
        log(self, step, *rest)
        if parallel.RANK == 1 and step == 2 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if parallel.RANK == 1 and step == 2 and how == "own error":
            raise data.BadInput("bad value")

    with patch.object(run.RunDirectory, "log", logged):
        more = ["--data", "nowhere.jsonl"] if how == "same error" else []
        parallel.run_main(lambda _: train(base, "grpo-dora", how.replace(" ", "-"), *more))


@pytest.mark.slow
def test_a_dead_rank_ends_the_job(ends, base):
    """Stops a rank from waiting forever for one that was killed; what was saved stays."""
    status, text = ends["killed"]
    assert status != 0 and "SIGKILL" in text
    assert artifacts(base / "killed")[2]["state"]["step"] in (0, 2)


@pytest.mark.slow
def test_a_rank_with_an_error_of_its_own(ends):
    """Stops the one line with the cause from drowning in tracebacks of broken connections."""
    status, text = ends["own error"]
    assert status != 0 and text.count("error: bad value (rank 1)") == 1
    assert "gloo" not in text and "RuntimeError" not in text


@pytest.mark.slow
def test_an_error_of_all_ranks(ends, base):
    """Stops an error without its rank, and a traceback, where all ranks meet the same one."""
    status, text = ends["same error"]
    lines = re.findall(r"error: .*nowhere\.jsonl.* \(rank (\d)\)\n", text)
    assert status != 0 and "BadInput" not in text
    assert lines and len(lines) == len(set(lines))  # torchrun may end one before it prints
    assert not (base / "same-error").exists()


if __name__ == "__main__":
    fail(sys.argv[1], Path(sys.argv[2]))
