"""tools/experiments.py: the control, going on after every kind of stop, the table."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, cells

import grpo
import reward
import sft
import training.run
from training import measure
from tools import experiments

METRICS = {"em": 0.5, "stale": 0.25, "format": 1.0, "reward": 2.0}
COLUMNS = [column for _, columns in experiments.SPLITS for column in columns.values()]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Undo the reward that a run adds."""
    monkeypatch.setitem(reward.CORRECTNESS, "random", None)


@pytest.fixture
def evaluated(monkeypatch):
    """The arguments of each call of measure_heldout(), which does no work and returns METRICS."""
    calls = []

    def measure_heldout(*args):
        calls.append(args)
        return METRICS

    for module in (measure, training.run):
        monkeypatch.setattr(module, "measure_heldout", measure_heldout)
    return calls


def result(**changes):
    return dict.fromkeys(COLUMNS, 0.5) | {"seconds": 1.0} | changes


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_control_is_rewarded_at_random_and_measured_truly(tmp_path, monkeypatch, evaluated):
    """Stops a control that sees the real reward, or whose metrics are as random as its rewards."""
    path = tmp_path / "random"
    monkeypatch.setitem(reward.CORRECTNESS, "random", experiments.at_random)
    flags = ["--correctness", "random", "--steps", "1"]
    assert experiments.train_and_measure(path, grpo, flags) == 0
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert all(-3 <= sample["reward"] <= 3 for sample in samples)
    [row] = rows(path)
    assert row["no_spread"] == 0  # equal answers differ in their rewards
    assert row["reward"] < 0.8  # the mean of 64 random ones is about 0, of the real ones 1.6
    assert [config.correctness for *_, config in evaluated] == ["es_star"] * 3


def test_a_run_goes_on(tmp_path, evaluated):
    """Stops a suite that restarts a stopped run, or measures something else than it trained."""
    path = tmp_path / "sft-1"
    assert experiments.train_and_measure(path, sft, ["--steps", "1"]) == 0
    first = rows(path)
    assert experiments.train_and_measure(path, sft, ["--steps", "2"]) == 0
    assert rows(path)[0] == first[0] and [row["step"] for row in rows(path)] == [1, 2]
    got = json.loads((path / "result.json").read_text())
    seconds = [row[name] for row in rows(path) for name in row if name.startswith("seconds")]
    assert got["seconds"] == pytest.approx(sum(seconds))
    assert [got[column] for column in COLUMNS] == [0.5, 0.25, 1.0, 2.0, 0.5, 0.5]
    layer = evaluated[-1][0].model.layers[0].self_attn.q_proj
    assert layer.lora_B.abs().sum() > 0


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again(tmp_path, monkeypatch, evaluated):
    """Stops a suite that fails forever once a run was killed before its first checkpoint."""
    path = tmp_path / "sft-lr-3e-3-1"
    flags = ["--steps", "1", "--lr", "3e-3"]
    seen = []
    real = sft.main
    monkeypatch.setattr(sft, "main", lambda argv: seen.append(argv) or real(argv))
    path.mkdir()
    (path / "lock").write_text("7")  # killed before it wrote its settings
    assert experiments.train_and_measure(path, sft, flags) == 0
    assert "--resume" not in seen[0] and seen[0][-2:] == ["--lr", "3e-3"]
    first = rows(path)
    (path / "checkpoint" / "state.pt").unlink()
    (path / "metrics.jsonl").write_text('{"step": 1, "e')  # killed in its first step
    assert experiments.train_and_measure(path, sft, flags) == 0
    assert [row["step"] for row in rows(path)] == [1] and rows(path)[0]["loss"] == first[0]["loss"]


def test_a_stopped_run_has_no_result(tmp_path, monkeypatch, evaluated):
    """Stops half-trained runs from being measured and taken for finished ones."""
    monkeypatch.setattr(sft, "main", lambda argv: 130)
    assert experiments.train_and_measure(tmp_path / "sft-1", sft, []) == 130
    assert evaluated == [] and not (tmp_path / "sft-1" / "result.json").exists()


def finish(output):
    """Put a result of its own into every run's directory."""
    number = 0
    for name in experiments.RUNS:
        for seed in [0] if name == "base" else experiments.SEEDS:
            path = output / f"{name}-{seed}"
            assert not path.exists()
            path.mkdir(parents=True)
            (path / "result.json").write_text(json.dumps(result(stale=number / 8)))
            number += 1


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch, capsys):
    """Stops finished runs from being trained again, seeds that share a directory, mixed-up rows."""
    finish(tmp_path / "x")
    monkeypatch.setattr(experiments, "train_and_measure", None)
    assert experiments.main(["--output", str(tmp_path / "x")]) == 0
    text = (tmp_path / "x" / "table.md").read_text()
    assert text in capsys.readouterr().out
    lines = [cells(line) for line in text.splitlines()[2:]]
    names = [row for row, _, _ in experiments.RUNS.values()]
    assert [line[0] for line in lines] == names
    means = [0] + [(2 + 3 * i) / 8 for i in range(len(names) - 1)]  # of 1, 2, 3 eighths; of 4, ...
    assert [line[2].split()[0] for line in lines] == [f"{value:.3f}" for value in means]


def test_table_by_hand():
    """Stops a mean over the wrong runs, a biased deviation, a column under the wrong heading."""
    values = {"exact match": 0.5, "stale": 0.25, "format": 1.0, "sampled reward": 2.0}
    values |= {"retention": 0.5, "two updates": 0.5}
    seeds = []
    for em, seconds in ((0.1, 10), (0.2, 20), (0.6, 30)):
        seeds.append(values | {"exact match": em, "seconds": seconds})
    seeds[0]["retention"] = 0.9
    by_name = {"base": [values | {"seconds": 0}], "GRPO (ES\\*)": seeds}
    head, line, base, grpo = experiments.results_table(by_name).splitlines()
    assert cells(head) == ["", *values, "seconds"]
    assert {cell.strip("-") for cell in cells(line)} == {""} and len(cells(line)) == 8
    assert cells(base) == ["base", "0.500", "0.250", "1.000", "2.000", "0.500", "0.500", "0"]
    spread = ["0.300 ± 0.265", "0.250 ± 0.000", "1.000 ± 0.000", "2.000 ± 0.000"]
    spread += ["0.633 ± 0.231", "0.500 ± 0.000", "20 ± 10"]
    assert cells(grpo) == ["GRPO (ES\\*)", *spread]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_a_stop(number, tmp_path):
    """Stops an experiment that goes on to the next run, or does not save, when it is told to stop.
    """
    command = [sys.executable, "-m", "tools.experiments"]
    output = tmp_path / "x"
    (output / "base-0").mkdir(parents=True)
    (output / "base-0" / "result.json").write_text(json.dumps(result()))
    process = subprocess.Popen([*command, "--output", str(output)], cwd=ROOT)
    log = output / "sft-42" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=600) == 130
    steps = len(rows(output / "sft-42"))
    checkpoint = output / "sft-42" / "checkpoint" / "state.pt"
    assert torch.load(checkpoint, weights_only=True)["state"]["step"] == steps > 0
    assert sorted(path.name for path in output.iterdir()) == ["base-0", "sft-42"]


def test_a_lost_run_ends_the_suite(tmp_path, monkeypatch, evaluated):
    """Stops a run whose loss is not finite from being measured, and a status that hides it."""
    monkeypatch.setattr(sft, "main", lambda argv: 1)
    assert experiments.main(["--output", str(tmp_path / "x")]) == 1
    assert len(evaluated) == 3  # the base model, on three files
    assert (
        not list(tmp_path.glob("x/sft*/result.json")) and not (tmp_path / "x" / "table.md").exists()
    )


def test_readme_shows_the_table_as_it_came_out():
    """Stops metrics in the README that no command gave."""
    measured = (ROOT / "figures" / "experiments.md").read_text()
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert any(measured in page.read_text() for page in pages)
