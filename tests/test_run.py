"""What a run shows: other programs' logs, the screen with and without a terminal, several runs
side by side.
"""

import importlib.util
import json
import re
import sys
import types

import pytest
from conftest import ROOT, SCRIPTS, cells

import data
import eval
import grpo
import rollout
import sft
from training import run, screen
from lib.config import BadInput
import tools.compare


def small(script):
    """The flags of a small run."""
    flags = "--prompts-per-step 2 --max-new-tokens 8 --r 4 --save-every 2"
    return f"{flags}{'' if script is sft else ' --num-samples 2'}".split()


@pytest.fixture
def train(tmp_path, checkpoints, write_rows, rows):
    """train(*flags, script=grpo): a small run into tmp_path/run; the exit status."""
    source = write_rows(rows)

    def start(*flags, script=grpo):
        fixed = [
            "--model",
            checkpoints["qwen2"],
            "--data",
            source,
            "--output",
            str(tmp_path / "run"),
        ]
        return script.main([*fixed, *small(script), *flags])

    return start


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def kill(monkeypatch, step):
    """End the next run as kill -9 would, after this step was logged."""
    log = run.RunDirectory.log

    def killed(self, now, *rest):
        log(self, now, *rest)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.RunDirectory, "log", killed)


# ------------------------------------------------------------------------- another program's log


def test_tensorboard(train, tmp_path, monkeypatch):
    """Stops metrics that differ from metrics.jsonl, and repeated steps after a killed run was
    resumed.
    """
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
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.server, self.started, self.refuse = {}, [], False

    def init(self, **settings):
        if self.refuse:
            raise self.Error("No API key\nconfigured")
        self.started.append(settings)
        self.here = self.server.setdefault(settings["id"], {})
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step"), "a repeated step would be a new point"

    def log(self, row):
        self.here[row["step"]] = row

    def finish(self):
        self.started[-1]["finished"] = True


def test_wandb(train, tmp_path, monkeypatch):
    """Stops a resumed run that starts a second one on the server, or is never finished."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    with monkeypatch.context() as patch:
        kill(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train("--steps", "5", "--log-to", "wandb")
    assert train("--steps", "5", "--log-to", "wandb", "--resume") == 0
    (rows,) = wandb.server.values()
    assert list(rows.values()) == metrics(tmp_path / "run")
    assert all(
        s["finished"] and s["resume"] == "allow" and s["config"]["lr"] == 5e-5
        for s in wandb.started
    )
    wandb.refuse = True
    with pytest.raises(
        BadInput, match="--log-to wandb: No API key; or set WANDB_MODE=offline"
    ):
        train("--steps", "6", "--log-to", "wandb", "--resume")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_log_that_cannot_be(train, tmp_path, monkeypatch, script):
    """Stops a run that finds out after an hour that the package is missing, or a name that means
    nothing.
    """
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    for name in ("tensorboard", "wandb"):
        with pytest.raises(
            BadInput, match=f"--log-to {name}: it is not installed; pip install {name}"
        ):
            train("--steps", "1", "--log-to", name, script=script)
    with pytest.raises(BadInput, match="--log-to 'mlflow': give one of tensorboard, wandb"):
        train("--steps", "1", "--log-to", "mlflow", script=script)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------- the screen


@pytest.mark.parametrize("script", SCRIPTS)
def test_quiet(train, tmp_path, capfd, script):
    """Stops --quiet from leaving out what matters, or from changing what is kept; and it may change
    on --resume.
    """
    assert train("--steps", "2", "--heldout", "0.3", "--quiet", script=script) == 0
    out, err = capfd.readouterr()
    assert (
        "4 kept" in out
        and "held-out tasks" in out
        and "exact match" in out
        and "done: " in out
    )
    assert (
        "sample of step" not in out and "tok/s" not in out and err == ""
    )
    assert len(metrics(tmp_path / "run")) == 2
    assert bool((tmp_path / "run/samples.jsonl").read_text()) == (script is not sft)
    assert train("--steps", "3", "--heldout", "0.3", "--resume", script=script) == 0
    assert "tok/s" in capfd.readouterr().out and len(metrics(tmp_path / "run")) == 3


def test_a_log_file_is_plain_text(train, capfd):
    """Stops bars, carriage returns and escape sequences where no terminal is, and lines too wide
    for one.
    """
    assert train("--steps", "2", "--heldout", "0.3") == 0
    out, err = capfd.readouterr()
    assert err == "" and all(char.isprintable() or char == "\n" for char in out)
    wide = [
        line for line in out.split("\n") if len(line) > 100 and "/" not in line
    ]  # paths are as long as they are
    assert wide == []


def test_samples_give_no_commands(capsys):
    """Stops a model that writes escape sequences from moving the cursor, and a note of several
    lines from breaking out.
    """
    example = data.Example("lib", "1", "", "first\nsecond", "x", "y")
    group = rollout.Group([], example, [], ["one\r\x1b[2Jtwo\n\tthree"], [0.5])
    screen.show_sample(3, group)
    text = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in text) and "note: first second" in text
    assert all(line == "" or line.startswith("    | ") for line in text.split("\n"))


PROGRAMS = "grpo dapo sft eval migrate tiny/make bench/bench".split()
PROGRAMS += [f"tools/{path.stem}" for path in (ROOT / "tools").glob("[a-z]*.py")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, tmp_path, monkeypatch, capsys):
    """Stops help that is wider than a screen, does not say what a flag is if not given, or starts
    the work.
    """
    monkeypatch.setenv("COLUMNS", "100")
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


# ------------------------------------------------------------------------- several runs


def write_run(directory, ems, start=1):
    directory.mkdir(parents=True)
    rows = []
    for i, em in enumerate(ems):
        rows.append({"step": start + i, "em": em, "reward": em and 6 * em - 3, "stale": 0.5})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def read_page(path):
    """The data of a page: a dict for every run."""
    text = path.read_text()
    start = text.index(">", text.index('id="data"')) + 1
    return json.loads(text[start : text.index("</script>", start)])


def test_runs_side_by_side(tmp_path, capsys):
    """Stops a mean over the wrong steps, a curve without a step, a name that breaks the page."""
    first = write_run(tmp_path / "a<b", [0.0] * 10 + [0.5, 1.0] * 5)
    second = write_run(tmp_path / "c", [0.25] * 4 + [None])
    with open(f"{second}/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "e')  # it is being written
    assert tools.compare.main([first, second, "--output", str(tmp_path / "new/x.html")]) == 0
    _, _, one, two, done = capsys.readouterr().out.splitlines()
    assert cells(one) == [first, "20", "0.750", "1.500", "0.500", *"----"]
    assert cells(two) == [second, "5", "0.250", "-1.500", "0.500", *"----"]
    assert done == f"done: {tmp_path}/new/x.html"
    long, short = read_page(tmp_path / "new/x.html")
    assert (long["name"], short["name"]) == (first, second)
    assert [point[0] for point in long["curves"]] == list(range(1, 21))
    points = [[step, -1.5, 0.25, 0.5, None, None, None, None, None, None] for step in range(1, 5)]
    assert short["curves"] == [*points, [5, None, None, 0.5, *[None] * 6]]


HELDOUT = {
    "before": {"em": 0.125, "stale": 0.75, "format": 1.0, "es": 0.5, "reward": 1.5},
    "after": {"em": 0.875, "stale": 0.0625, "format": 1.0, "es": 1.0, "reward": None},
}


def test_a_run_that_does_not_sample(tmp_path, capsys):
    """Stops a failure for SFT, whose rows have no reward, and a lost held-out result."""
    grpo_run, sft_run = write_run(tmp_path / "grpo", [0.5, 0.5]), tmp_path / "sft"
    sft_run.mkdir()
    row = {"step": 30, "loss": 0.5, "kl": 0.0, "grad_norm": 1.0, "completion_length": 9.0}
    (sft_run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (sft_run / "heldout.json").write_text(json.dumps(HELDOUT))
    output = ["--output", str(tmp_path / "x.html")]
    assert tools.compare.main([grpo_run, str(sft_run), *output]) == 0
    head, _, one, two, _ = capsys.readouterr().out.splitlines()
    assert cells(one) == [grpo_run, "2", "0.500", "0.000", "0.500", *"----"]
    assert cells(two) == [str(sft_run), "30", *"---", "0.125", "0.875", "-", "0.062"]
    names = ["exact", "reward", "stale"]
    assert cells(head) == ["", "step", *names, "held out: before", *names]
    _, run = read_page(tmp_path / "x.html")
    assert run["curves"] == [[30, None, None, None, None, None, 9.0, 0.0, None, 0.5]]
    assert "exact match 0.125 0.875 +0.750" in " ".join(run["heldout"].split())
    (sft_run / "heldout.json").write_text("{")
    with pytest.raises(BadInput, match="heldout.json"):
        tools.compare.main([str(sft_run), *output])


def test_runs_that_are_none(tmp_path):
    """Stops a traceback for a directory that is no run, or for one that has not made a step."""
    output = ["--output", str(tmp_path / "x.html")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: no metrics.jsonl"):
        tools.compare.main([str(tmp_path / "empty"), *output])
    (tmp_path / "empty/metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="with a step"):
        tools.compare.main([str(tmp_path / "empty"), *output])
    (tmp_path / "empty/metrics.jsonl").write_text("not JSON\n")
    with pytest.raises(BadInput, match="metrics.jsonl, line 1: not JSON"):
        tools.compare.main([str(tmp_path / "empty"), *output])
    (tmp_path / "empty/metrics.jsonl").write_text('{"loss": 1}\n{"step": 1, "e')
    with pytest.raises(BadInput, match="with a step"):
        tools.compare.main([str(tmp_path / "empty"), *output])
    assert not (tmp_path / "x.html").exists()


# ------------------------------------------------------------------------- progress


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal, monkeypatch, capsys):
    """Stops minutes of silence without a terminal, a log full of lines, and a wrong time left."""
    clock = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    seen = []
    for batch in screen.progress([[1, 2], [3], [4, 5, 6, 7], [8]] + [[9]] * 20 + [[]], "tasks"):
        seen += batch
        clock[0] += 29.0 if batch == [3] else 11.0
        if seen == [1, 2]:
            assert capsys.readouterr().out == ("" if terminal else "tasks: 0 of 28\n")
    lines = capsys.readouterr().out.splitlines()
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, *[9] * 20]
    if terminal:
        assert lines == []
        return
    assert lines[0] == "tasks: 3 of 28, 05:33 left"  # 40 seconds for 3: 333 for 25 more
    assert lines[1] == "tasks: 9 of 28, 02:34 left"  # 73 seconds for 9
    assert len(lines) == 8  # in 293 seconds, every 33
    list(screen.progress([[1]], "tasks", hidden=True))
    assert capsys.readouterr().out == ""


def test_measurements_show_progress(checkpoints, write_rows, rows, tmp_path, capsys):
    """Stops the held-out measurements of a run, and eval.py, from doing without that."""
    source = write_rows(rows)
    flags = ["--model", checkpoints["qwen2"], "--data", source, "--max-new-tokens", "4"]
    flags += ["--num-samples", "2"]
    small = ["--heldout", source, "--steps", "1", "--prompts-per-step", "1", "--r", "4"]
    assert grpo.main([*flags, *small, "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("\nheld-out tasks: 0 of 6\n") == 2
    assert grpo.main([*flags, *small, "--quiet", "--output", str(tmp_path / "quiet")]) == 0
    assert "tasks: " not in capsys.readouterr().out
    assert eval.main([*flags, "--k", "1", "--output", str(tmp_path / "eval")]) == 0
    assert "\nmigration: 0 of 6\n" in capsys.readouterr().out
