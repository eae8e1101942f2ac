"""grpo.py, dapo.py and sft.py as programs: what they refuse, leave behind, how they stop and go on.

Most runs are calls of main() in this process, since a new one spends six seconds on imports.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dapo
import reward
import sft
from conftest import FAMILIES, ROOT, ROWS, TWINS
from lib.config import BadInput
from lib import parallel
from training import run, setup
import lib.config

SMALL = {"steps": 2, "prompts_per_step": 2, "max_new_tokens": 8, "r": 4}


@pytest.fixture(params=TWINS)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def spread(monkeypatch):
    """Rewards that differ within a group: the answers of a random model are all equally bad."""
    spread = lambda grade, example, kind: sum(map(ord, grade.completion)) % 7 - 3.0
    monkeypatch.setattr(reward, "total", spread)


def flags(settings):
    """Settings as a command line; True is a flag without a value."""
    pairs = [("--" + name.replace("_", "-"), value) for name, value in settings.items()]
    return [
        word for flag, value in pairs for word in ([flag] if value is True else [flag, str(value)])
    ]


@pytest.fixture
def settings(script, tmp_path, checkpoints, write_rows, rows):
    """The settings of a small run into tmp_path/run."""
    sampled = {} if script is sft else {"num_samples": 2}
    return SMALL | sampled | {
        "model": checkpoints["qwen2"],
        "data": write_rows(rows),
        "output": tmp_path / "run",
    }


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A copy of the Qwen2 checkpoint, to be spoilt."""
    return Path(shutil.copytree(checkpoints["qwen2"], tmp_path / "checkpoint"))


@pytest.fixture
def refused(script, settings, write_rows, monkeypatch, capfd):
    """refused(**changes): the one line on stderr with which a run of these settings must end,
    status 2.
    """

    def refuse(**changes):
        if isinstance(changes.get("data"), list):
            changes["data"] = write_rows(changes["data"], "bad.jsonl")
        output = Path((settings | changes)["output"])
        before = contents(output)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags(settings | changes)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            parallel.run_main(script.main)
        stderr = capfd.readouterr().err
        assert stop.value.code == 2 and re.fullmatch(r"error: .+\n", stderr), stderr
        assert contents(output) == before
        return stderr

    return refuse


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def metrics(directory):
    """The rows of metrics.jsonl, which must be JSON as other programs know it, without NaN."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in lines
    ]


@pytest.mark.slow
def test_error_as_a_program(script, settings):
    """A traceback, or a success in the exit status, for a mistake of the user."""
    argv = flags(settings | {"data": "none.jsonl"})
    done = subprocess.run(
        [sys.executable, f"{script.__name__}.py", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and done.stdout == "" and not settings["output"].exists()
    assert re.fullmatch(r"error: data: .*'none.jsonl'.*\n", done.stderr)


BAD_SETTINGS = [
    *[({name: value}, "--" + name.replace("_", "-")) for value in (0, -1, "two") for name in (
        "steps", "prompts_per_step", "num_samples", "max_prompt_tokens", "max_new_tokens",
        "temperature", "updates",
        "r", "alpha", "lr", "max_grad_norm", "micro_tokens", "save_every", "show_every")],
    ({"steps": 1.5}, "--steps"), ({"lr": "nan"}, "--lr"), ({"lr": "inf"}, "--lr"),
    ({"seed": -1}, "--seed"), ({"beta": -0.1}, "--beta"), ({"warmup": 1.5}, "--warmup"),
    ({"dropout": 1}, "--dropout"),
    ({"prompts_per_step": 4, "updates": 3}, "--updates 3"), ({"correctness": "magic"}, "es_star"),
    ({"targets": "q_proj,nope"}, "nope"), ({"max_prompt_tokens": 5}, "max-prompt-tokens 5"),
    ({"stepz": 3}, "--stepz"),
    ({"heldout": "1.5"}, "1.5"), ({"heldout": "none.jsonl"}, "none.jsonl"),
    ({"seed": 2**62}, "--seed"),
    ({"model": "none"}, "model: no directory 'none'"),
    ({"model": "no/such/directory"}, "model: no directory 'no/"),
    ({"model": ROOT / "grpo.py"}, "model: no directory"), ({"data": "none.jsonl"}, "none.jsonl"),
    ({"data": ROOT}, "data: no file"), ({"data": []}, "file is empty"),
    ({"data": [ROWS[0], "{"]}, "line 2: not JSON"),
    ({"data": [ROWS[0], {"dependency": "x"}]}, "line 2: field 'new_version'"),
    ({"data": [ROWS[0] | {"new_code": "("}] * 2}, "no usable row in"),
]  # fmt: skip


@pytest.mark.parametrize("changes, word", BAD_SETTINGS, ids=lambda value: str(value)[:40])
def test_bad_settings(refused, changes, word):
    """A setting, data file or path that makes no sense costs training time before it is noticed, or
    a traceback.
    """
    assert word in refused(**changes)


def test_no_permission(monkeypatch, capsys):
    """Stops a traceback where a file may not be read or written."""
    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(lambda argv: open(ROOT / "tests" / "conftest.py" / "x"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: [Errno 20] Not a directory: '")


def test_bad_settings_of_one_script(script, refused):
    """Stops a group of one completion, which has no advantage, and a penalty longer than the
    completion.
    """
    if script is not sft:
        assert "at least 2" in refused(num_samples=1)
    if script is dapo:
        assert "--overlong-cache 9" in refused(overlong_cache=9) and "--max-tries 0" in refused(
            max_tries=0
        )
        assert "--overlong-cache -1" in refused(overlong_cache=-1)


SPOILT = [
    ("tokenizer.json", None, "no tokenizer"), ("tokenizer.json", "garbage", "tokenizer"),
    ("tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": null}', "no EOS"),
    ("config.json", None, "config.json"), ("config.json", '{"model_type": "magic"}', "magic"),
    ("config.json", "garbage", "config.json"), ("model.safetensors", None, "model.safetensors"),
    ("model.safetensors", "garbage", "cannot load"), ("defaults.json", "garbage", "defaults.json"),
    ("defaults.json", "[1]", "defaults.json"),
    ("defaults.json", '{"stepz": 3}', "stepz"), ("defaults.json", '{"steps": "3"}', "steps"),
    ("defaults.json", '{"lr": "fast"}', "lr"), ("defaults.json", '{"targets": 5}', "targets"),
    ("defaults.json", '{"data": 5}', "data"), ("defaults.json", '{"r": 1.5}', "r"),
    ("defaults.json", '{"resume": "yes"}', "resume"), ("defaults.json", '{"beta": -1}', "beta"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, word", SPOILT)
def test_bad_checkpoint(refused, checkpoint, name, content, word):
    """A checkpoint with a part missing or broken ends in a traceback from the depths of a library.
    """
    (checkpoint / name).unlink(missing_ok=True)
    if content is not None:
        (checkpoint / name).write_text(content)
    assert word in refused(model=checkpoint)


def test_bad_output(refused, settings):
    """A second run mixes its files with the first one's, or a directory that cannot be made is a
    traceback.
    """
    assert "no checkpoint" in refused(resume=True)
    assert "cannot write" in refused(output=Path(settings["data"]) / "run")
    assert "not empty" in refused(output=settings["data"])
    settings["output"].mkdir()
    (settings["output"] / "notes.txt").write_text("mine")
    assert "not empty" in refused() and "no checkpoint" in refused(resume=True)


OTHERWISE = {  # where the others' defaults are not those of the paper's GRPO run
    "grpo": {},
    "dapo": {
        "prompts_per_step": 8,
        "updates": 2,
        "clip_high": 0.28,
        "beta": 0.0,
        "max_tries": 10,
        "overlong_cache": 0,
    },
    "sft": {},
}


def test_paper_defaults(script, capsys):
    """--model alone must be the paper's run, every setting a flag with its help, and tiny the
    embedded default.
    """
    paper = {
        "data": "zjunlp/ReCode-Train-Data", "heldout": "", "steps": 5000, "prompts_per_step": 1,
        "num_samples": 8,
        "max_prompt_tokens": 2048, "max_new_tokens": 1024, "temperature": 1.0,
        "correctness": "es_star",
        "clip_low": 0.2, "clip_high": 0.2, "beta": 0.001, "updates": 1, "r": 64, "alpha": 64.0,
        "dropout": 0.01,
        "targets": "q_proj,v_proj", "lr": 5e-5, "warmup": 0.03, "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }  # fmt: skip
    config = lib.config.parse_config(script.Config, ["--model", "some/model"], "doc")
    paper |= OTHERWISE[script.__name__]
    assert {name: value for name, value in paper.items() if name in vars(config)}.items() <= vars(
        config
    ).items()
    for given, keep in (["--no-keep-activations"], False), (["--keep-activations"], True):
        config = lib.config.parse_config(script.Config, given, "doc")
        assert config.keep_activations is keep
    config = lib.config.parse_config(script.Config, [], "doc")
    assert config.keep_activations is None
    assert Path(config.data).is_file() and Path(config.heldout).is_file()
    assert Path(config.model).resolve() == ROOT / "tiny"
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "(eq. 7)" in text
    for field in dataclasses.fields(script.Config):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"^  {flag}(?: X|, --no-\S+)\s+\S", text, re.MULTILINE), field.name


COLUMNS = """
step loss grad_norm lr completion_length tokens_per_second seconds_sample seconds_update
""".split()
SAMPLED = "kl reward reward_std format es em stale clip_fraction truncated".split()  # not in sft.py


@pytest.mark.parametrize("family", FAMILIES)
def test_run_directory(script, family, checkpoints, settings, write_rows, rows, capsys):
    """A family of models that breaks the run, or a run that leaves less behind than it promises."""
    changes = (
        {"description": "as before"},
        {"new_code": "("},
        {"update_info": None},
        {"old_code": "x\n" * 5000},
    )
    rows += [rows[0] | change for change in changes]
    settings |= {"model": checkpoints[family], "data": write_rows(rows), "heldout": "0.3"}
    assert script.main(flags(settings)) == 0
    out, path = capsys.readouterr().out, settings["output"]
    kept = [
        " 1 dropped: repeat",
        " 1 dropped: the reference",
        " 1 dropped: no update",
        " 1 dropped: prompt over 2,048",
    ]
    assert all(
        word in out
        for word in [*kept, "4 kept, 2 held out", "3 dropped", "before", "exact match"]
    )
    config = {
        name: str(value) for name, value in json.loads((path / "config.json").read_text()).items()
    }
    assert config.items() >= {name: str(value) for name, value in settings.items()}.items()
    assert config.keys() == {field.name for field in dataclasses.fields(script.Config)} | {
        "began_in"
    }
    table = metrics(path)
    columns = COLUMNS if script is sft else COLUMNS + SAMPLED
    assert [row["step"] for row in table] == [1, 2] and all(
        row.keys() >= set(columns) for row in table
    )
    assert all(isinstance(row[name], int | float) for row in table for name in columns)
    assert all(
        -3 <= row.get("reward", 0) <= 3 and ("reward" in row) == (script is not sft)
        for row in table
    )
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert bool(samples) == (script is not sft)
    assert all(isinstance(sample["completion"], str) and "reward" in sample for sample in samples)
    assert (path / "page.html").read_text().endswith("</script>\n")
    assert list((path / "checkpoint").iterdir()) and not list(path.rglob("*.tmp"))
    assert {file.name for file in (path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_no_chat_template(script, checkpoint, settings, capsys):
    """A base model without a chat template ends in a traceback, or silently in another prompt."""
    (checkpoint / "chat_template.jinja").unlink()
    assert script.main(flags(settings | {"model": checkpoint})) == 0
    assert re.search("warning .*no chat template", capsys.readouterr().out)


def test_checkpoint_defaults(script, checkpoint, settings):
    """The defaults that a checkpoint brings are ignored, or beat the flag they should yield to."""
    shutil.move(settings.pop("data"), checkpoint / "rows.jsonl")
    defaults = {"data": "rows.jsonl", "steps": 3, "lr": 1, "alpha": 0.5, "targets": "o_proj"}
    (checkpoint / "defaults.json").write_text(json.dumps(defaults))
    assert script.main(flags(settings | {"model": checkpoint, "steps": 1, "lr": 0.001})) == 0
    config = json.loads((settings["output"] / "config.json").read_text())
    expected = defaults | {"data": str(checkpoint / "rows.jsonl"), "steps": 1, "lr": 0.001}
    assert expected.items() <= config.items() and len(metrics(settings["output"])) == 1


LATER = [pytest.param(number, marks=pytest.mark.slow) for number in (2, 3, 5, 6, 8)]


@pytest.mark.parametrize("when", [1, "while logging", *LATER])
def test_full_disk(script, settings, monkeypatch, when):
    """A disk that fills up takes the last checkpoint with it, or leaves half a file that --resume
    chokes on.
    """
    settings |= {"steps": 4, "save_every": 1}
    assert script.main(flags(settings | {"steps": 2})) == 0
    before, calls = contents(settings["output"]), []

    def full(*args):
        calls.append(args)
        if len(calls) == when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_a_row(path, mode):
        if mode == "a":
            Path(path).write_text(Path(path).read_text() + '{"step": 3, "rew')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if when == "while logging":
            patch.setattr(run, "open", half_a_row, raising=False)
        with pytest.raises(BadInput, match="cannot write .*: No space left"):
            script.main(flags(settings | {"resume": True}))
    assert before.keys() == contents(settings["output"]).keys()
    assert torch.load(settings["output"] / "checkpoint/state.pt", weights_only=True)["state"][
        "step"
    ] in (2, 3, 4)
    assert (settings["output"] / "page.html").read_text().endswith("</script>\n")
    json.loads((settings["output"] / "config.json").read_text())
    assert script.main(flags(settings | {"resume": True})) == 0
    assert [row["step"] for row in metrics(settings["output"])] == [1, 2, 3, 4]


@pytest.fixture
def spoil(script, monkeypatch):
    """spoil(steps): from now on the loss of these steps of a run is NaN."""
    token_weights, update = script.token_weights, script.update

    def start(steps):
        done = []
        monkeypatch.setattr(script, "update", lambda *args: done.append(0) or update(*args))
        factor = lambda: torch.nan if len(done) in steps else 1.0
        monkeypatch.setattr(
            script, "token_weights", lambda *args: token_weights(*args) * factor()
        )

    return start


def test_skipped_steps(script, settings, spoil):
    """One bad step poisons the parameters, or a few of them, never three in a row, end the run."""
    spoil({2, 3, 5, 6, 8})
    assert script.main(flags(settings | {"steps": 8, "save_every": 1})) == 0
    rows = metrics(settings["output"])
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0, 1, 1, 0, 1]
    assert all(
        (row["loss"] is None) == (row["grad_norm"] is None) == bool(row["skipped"]) for row in rows
    )
    saved = torch.load(settings["output"] / "checkpoint/state.pt", weights_only=True)
    assert saved["state"]["step"] == 8 and all(
        tensor.isfinite().all() for tensor in saved["trained"].values()
    )


@pytest.mark.parametrize("save_every", [1, 100])
def test_three_skipped_steps(script, settings, spoil, capsys, save_every):
    """Stops a run whose loss is not finite from going on for days, or from ending without an
    earlier checkpoint.
    """
    spoil({3, 4, 5})
    settings |= {"steps": 9, "save_every": save_every}
    assert script.main(flags(settings)) == 1
    assert "not finite" in capsys.readouterr().out and len(metrics(settings["output"])) == 5
    saved = torch.load(settings["output"] / "checkpoint/state.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["trained"].values())
    config = json.loads((settings["output"] / "config.json").read_text())
    updates = {state["step"].item() for state in saved["optimizer"]["state"].values()}
    assert updates == {2 * config["updates"]} or updates == set() and save_every == 100
    spoil({})
    assert script.main(flags(settings | {"resume": True})) == 0
    assert [row["step"] for row in metrics(settings["output"])] == list(range(1, 10))


def test_overflowed_weights(script, checkpoint, settings, monkeypatch):
    """Stops overflowed weights from crashing the sampler before the loss is checked."""
    make = setup.make_trainable

    def overflowed(model, *args):
        make(model, *args)
        model.model.norm.weight.data.fill_(torch.nan)

    monkeypatch.setattr(setup, "make_trainable", overflowed)
    assert script.main(flags(settings | {"model": checkpoint, "steps": 9})) == 1
    assert [row["skipped"] for row in metrics(settings["output"])] == [1, 1, 1]


@pytest.mark.slow
def test_interrupt_and_resume(script, settings):
    """Ctrl-C throws the work away, or --resume leaves a gap or a repeat in the log."""
    settings |= {"steps": 100_000, "show_every": 100_000, "save_every": 100_000}
    log = settings["output"] / "metrics.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, f"{script.__name__}.py", *flags(settings)], cwd=ROOT, **pipes
    )
    try:
        deadline = time.monotonic() + 100
        while (
            not (log.exists() and log.read_text())
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    assert "the same command with --resume continues" in out
    assert (settings["output"] / "adapter/adapter_model.safetensors").is_file()
    steps = len(metrics(settings["output"]))
    with open(log, "a") as file:
        file.write('{"step": ')  # as after a kill
    settings["steps"] = steps + 2
    assert script.main(flags(settings | {"resume": True})) == 0
    assert [row["step"] for row in metrics(settings["output"])] == list(range(1, steps + 3))


def test_interrupt_after_a_skipped_step(script, settings, spoil, monkeypatch):
    """Ctrl-C just after a skipped step is taken for the end of a lost run: nothing saved, status 1.
    """
    spoil({2})
    log = run.RunDirectory.log

    def ask(self, step, *rest):
        log(self, step, *rest)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.RunDirectory, "log", ask)
    assert script.main(flags(settings | {"steps": 4})) == 130
    assert script.main(flags(settings | {"steps": 4, "resume": True})) == 0


def test_resume_with_other_settings(script, refused, settings):
    """Going on with another learning rate, data or size mixes two experiments under one name."""
    assert script.main(flags(settings)) == 0
    assert "not empty" in refused()
    for name, value in {"lr": 0.001, "temperature": 0.5, "seed": 1, "correctness": "em"}.items():
        message = refused(resume=True, **{name: value})
        assert name in message and str(value) in message
    assert script.main(flags(settings | {"resume": True, "steps": 3, "save_every": 7})) == 0
    assert [row["step"] for row in metrics(settings["output"])] == [1, 2, 3]


def test_resume_from_a_damaged_checkpoint(script, settings):
    """A checkpoint that lost its end on the way from another machine ends in a traceback."""
    assert script.main(flags(settings)) == 0
    state = settings["output"] / "checkpoint/state.pt"
    for content in (state.read_bytes()[:5000], b"garbage", b""):
        state.write_bytes(content)
        with pytest.raises(BadInput, match="state.pt is damaged"):
            script.main(flags(settings | {"resume": True}))
