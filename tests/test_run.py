"""What a run shows: other programs' logs, the screen with and without a terminal, curves and tables."""

import builtins
import importlib.util
import io
import json
import re
import sys
import types
from xml.etree import ElementTree

import pytest
from conftest import ROOT, SCRIPTS

import data
import grpo
import recode
from training import run
from training.config import BadInput
import tools.compare

SMALL = ["--prompts-per-step", "2", "--num-samples", "2", "--max-new-tokens", "8", "--r", "4", "--save-every", "2"]


@pytest.fixture
def train(tmp_path, checkpoints, write_rows, rows):
    """train(*flags, script=grpo): a small run into tmp_path/run; the exit status."""
    source = write_rows(rows)

    def start(*flags, script=grpo):
        fixed = ["--model", checkpoints["qwen2"], "--data", source, "--output", str(tmp_path / "run")]
        return script.main([*fixed, *SMALL, *flags])

    return start


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def kill(monkeypatch, step):
    """End the next run as kill -9 would, after this step was logged."""
    log = run.Run.log

    def killed(self, figures, groups):
        log(self, figures, groups)
        if figures["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "log", killed)


# ------------------------------------------------------------------------- the log of another program


def test_tensorboard(train, tmp_path, monkeypatch):
    """Stops figures that differ from metrics.jsonl, and steps that are there twice after a killed run went on."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with monkeypatch.context() as patch:
        kill(patch, 3)  # one step behind the last checkpoint
        with pytest.raises(KeyboardInterrupt):
            train("--steps", "5", "--log-to", "tensorboard")
    assert train("--steps", "5", "--log-to", "tensorboard", "--resume") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    rows = metrics(tmp_path / "run")
    for name in ("reward", "em", "loss", "seconds_sample"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows
        ]
    assert set(events.Tags()["scalars"]) == rows[0].keys()


class Wandb(types.ModuleType):
    """A stand-in for the package: a server that remembers, by id, the rows it got."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.server, self.started, self.step, self.refuse = {}, [], 0, False

    def init(self, **settings):
        if self.refuse:
            raise self.Error("No API key\nconfigured")
        self.started.append(settings)
        self.here = self.server.setdefault(settings["id"], {})
        self.step = max(self.here, default=-1) + 1
        return self

    def log(self, row, step):
        assert step >= self.step, "wandb ignores earlier steps, with a warning for each"
        self.here[step], self.step = row, step

    def finish(self):
        self.started[-1]["finished"] = True


def test_wandb(train, tmp_path, monkeypatch):
    """Stops a resumed run that starts a second one on the server, sends a step twice, or is never finished."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    with monkeypatch.context() as patch:
        kill(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train("--steps", "5", "--log-to", "wandb")
    first = metrics(tmp_path / "run")
    assert train("--steps", "5", "--log-to", "wandb", "--resume") == 0
    (rows,) = wandb.server.values()
    assert [rows[step] for step in (1, 2, 3)] == first and [rows[step] for step in (4, 5)] == (
        metrics(tmp_path / "run")[3:]
    )
    assert all(s["finished"] and s["resume"] == "allow" and s["config"]["lr"] == 5e-5 for s in wandb.started)
    wandb.refuse = True
    with pytest.raises(BadInput, match="--log-to wandb: No API key configured; or set WANDB_MODE=offline"):
        train("--steps", "6", "--log-to", "wandb", "--resume")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_log_that_cannot_be(train, tmp_path, monkeypatch, script):
    """Stops a run that finds out after an hour that the package is missing, or a name that means nothing."""
    real = builtins.__import__

    def missing(name, *more):
        if name in ("wandb", "torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(BadInput, match=f"--log-to {name}: it is not installed; pip install {name}"):
            train("--steps", "1", "--log-to", name, script=script)
    with pytest.raises(BadInput, match="--log-to 'mlflow': give tensorboard or wandb"):
        train("--steps", "1", "--log-to", "mlflow", script=script)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------- the screen


@pytest.mark.parametrize("script", SCRIPTS)
def test_quiet(train, tmp_path, capfd, script):
    """Stops --quiet from leaving out what matters, or from changing what is kept; and it may change on --resume."""
    assert train("--steps", "2", "--heldout", "0.3", "--quiet", script=script) == 0
    out, err = capfd.readouterr()
    assert "4 tasks kept" in out and "held-out tasks" in out and "exact match" in out and "done: " in out
    assert "sample of step" not in out and "estimate" not in out and "tok/s" not in out and err == ""
    assert len(metrics(tmp_path / "run")) == 2 and (tmp_path / "run/samples.jsonl").read_text()
    assert train("--steps", "3", "--heldout", "0.3", "--resume", script=script) == 0
    assert "tok/s" in capfd.readouterr().out and len(metrics(tmp_path / "run")) == 3


def terminal(tty):
    """A text file that says whether it is a terminal."""
    file = io.StringIO()
    file.isatty = lambda: tty
    return file


def test_styles_are_for_terminals(monkeypatch):
    """Stops escape sequences in a log file, or for users who have asked for none."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal(True))
    assert run.style("x", "1") == "\033[1mx\033[0m"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert run.style("x", "1") == "x"
    monkeypatch.setattr(sys, "stdout", terminal(False))
    assert run.style("x", "1") == "x"


def test_a_log_file_is_plain_text(train, capfd):
    """Stops bars, carriage returns and escape sequences where no terminal is, and lines too wide for one."""
    assert train("--steps", "2", "--heldout", "0.3") == 0
    out, err = capfd.readouterr()
    assert err == "" and all(char.isprintable() or char == "\n" for char in out)
    wide = [line for line in out.split("\n") if len(line) > 100 and "/" not in line]  # paths are as long as they are
    assert wide == []


def test_samples_give_no_commands(tokenizer):
    """Stops a model that writes escape sequences from moving the cursor, and a note of several lines from breaking out."""
    example = data.Example("lib", "1", "", "first\nsecond", "x", "y")
    text = run.show(3, recode.Group([], example, [], ["one\r\x1b[2Jtwo\n\tthree"], [0.5]))
    assert all(char.isprintable() or char == "\n" for char in text) and "note: first second" in text
    assert all(line == "" or line.startswith("    | ") for line in text.split("\n"))


PROGRAMS = "grpo dapo sft eval migrate tools/experiments tools/compare tools/check_data tiny/make bench/bench".split()


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, tmp_path, monkeypatch, capsys):
    """Stops help that is wider than a screen, does not say what a flag is if not given, or starts the work."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.chdir(tmp_path)
    name = program.replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{program}.py")
    monkeypatch.setitem(sys.modules, name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as stop:
        module.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == "" and list(tmp_path.iterdir()) == []
    assert max(map(len, out.split("\n"))) <= 100
    for flag in re.findall(r"\n  (--.+(?:\n {8,}.*)*)", out[out.index("\noptions:") :]):
        assert re.search(r"\[[^]]+\]$|\(required\)|is required|the same from a file", flag), flag


# ------------------------------------------------------------------------- curves and tables


def write_run(directory, ems, start=1):
    directory.mkdir(parents=True)
    rows = [{"step": start + i, "em": em, "reward": em and 6 * em - 3, "stale": 0.5} for i, em in enumerate(ems)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def test_runs_side_by_side(tmp_path, capsys):
    """Stops a mean over the wrong steps, a line in the wrong place or panel, and a name that breaks the picture."""
    first = write_run(tmp_path / "a<b", [0.0] * 10 + [0.5, 1.0] * 5)
    second = write_run(tmp_path / "c", [0.25] * 4 + [None])
    with open(f"{second}/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "e')  # it is being written
    assert tools.compare.main([first, second, "--output", str(tmp_path / "new/x.svg")]) == 0
    _, one, two, done = capsys.readouterr().out.splitlines()
    assert one.split()[1:] == ["20", "0.750", "1.500", "0.500"] and two.split()[1:] == ["5", "0.250", "-1.500", "0.500"]
    assert one.startswith(first) and done == f"done: {tmp_path}/new/x.svg"
    root = ElementTree.parse(tmp_path / "new/x.svg").getroot()
    names = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {first, second, "exact match", "reward"} <= set(names)
    lines = [element.get("points").split() for element in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert list(map(len, lines)) == [20, 4, 20, 4]  # exact match of both, then reward of both
    for short, left in ((lines[1], 50), (lines[3], 430)):
        points = [tuple(map(float, point.split(","))) for point in short]
        assert {y for _, y in points} == {290 - 250 / 4}  # a quarter up, in both panels
        assert [x for x, _ in points] == [pytest.approx(left + 300 * i / 19, abs=0.06) for i in range(4)]
    last = [tuple(map(float, point.split(","))) for point in lines[0]][-1]
    assert last == pytest.approx((350, 290 - 250 * 0.8), abs=0.1)  # the last five: 1, .5, 1, .5, 1


def test_runs_that_are_none(tmp_path):
    """Stops a traceback for a directory that is no run, or for one that has not made a step."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: no metrics.jsonl there"):
        tools.compare.main([str(tmp_path / "empty")])
    (tmp_path / "empty/metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="no step"):
        tools.compare.main([str(tmp_path / "empty"), "--output", str(tmp_path / "x.svg")])
    assert not (tmp_path / "x.svg").exists()
