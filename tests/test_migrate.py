"""migrate.py as a program: which answer is taken, what becomes of the file, which model answers.

Most tests put answers into the sampler's mouth: what a small model says is beside the point.
"""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ROWS, random_model

import data
from training import dora
import grpo
import migrate
import recode
from training.config import BadInput
from training import loading
from training import parallel

EXAMPLE = data.Example(**ROWS[0])
MODEL = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
OLD, NEW = "import np\nx = np.in1d(a, b)\ny = x", "import np\nx = np.isin(a, b)\ny = x"


def answer(code):
    return f"\nhm\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


@pytest.fixture
def say(monkeypatch, tokenizer):
    """say(texts, logps=...): what sample() returns from now on; a text that ends in "..." was cut."""

    def start(texts, logps=None):
        rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] * (not text.endswith("...")) for text in texts]
        tokens, lengths = recode.pad(rows, "cpu")
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        values = torch.zeros(mask.shape)
        values[:, 0] = torch.tensor([0.0] * len(rows) if logps is None else logps)
        monkeypatch.setattr(recode, "sample", lambda *args, **more: [tokens, mask, values])
        return len(texts)

    return start


def answer_with(tokenizer, n):
    return migrate.migrate(MODEL, tokenizer, EXAMPLE, n, 64)


def test_the_answer_that_the_others_agree_with(say, tokenizer):
    """Stops a choice by likelihood or by order alone: the odd one out is likely and comes first."""
    code, details = answer_with(tokenizer, say([answer("import os"), answer(NEW), answer(NEW)], [-1.0, -9.0, -9.0]))
    assert code == NEW and details["usable"] == 3 and details["cut"] == 0
    # ab shares one of two characters with each of the others, which share none with each other
    code, details = answer_with(tokenizer, say([answer(code) for code in ("aa", "ab", "bb")]))
    assert code == "ab" and details["agreement"] == 0.5


def test_of_equals_the_likeliest(say, tokenizer):
    """Stops ties that the order decides, and comments that count as disagreement."""
    n = say(["no code", answer(NEW + "  # one"), answer(NEW + "  # two"), answer(NEW)], [-1.5, -3.0, -1.0, -2.0])
    code, details = answer_with(tokenizer, n)
    assert code.endswith("# two") and details["agreement"] == 1


def test_what_is_no_answer_is_left_out(say, tokenizer):
    """Stops code that does not parse, or none at all, from being taken because several samples agree on it."""
    broken, empty = answer("x = ("), answer("# nothing")
    n = say([broken, broken, "no code", empty, answer(NEW), "no end ..."])
    code, details = answer_with(tokenizer, n)
    assert code == NEW and details == {
        "answers": 6, "usable": 1, "without_code": 3, "not_parsed": 2, "cut": 1, "agreement": None}  # fmt: skip
    code, details = answer_with(tokenizer, say([broken, "..."]))
    assert code is None and (details["usable"], details["agreement"]) == (0, None)


# ------------------------------------------------------------------------- the file


@pytest.fixture
def program(tmp_path, monkeypatch, say, checkpoints):
    """program(content, code, *flags): the exit status of migrate.main on a file of these bytes, old.py in tmp_path."""

    def run(content, code, *flags, file="old.py"):
        if content is not None:
            (tmp_path / "old.py").write_bytes(content)
        if code is not None:
            say([answer(code)] * 2)
        argv = [file, "--library", "np", "--version", "2.0", "--model", checkpoints["qwen2"], *flags]
        argv += [] if {"--update", "--update-file"} & set(flags) else ["--update", "in1d is now isin"]
        return migrate.main(argv)

    monkeypatch.chdir(tmp_path)
    return run


FORMS = {  # what stands around the code, the line ending
    "plain": ("", "\n", "\n"), "no final newline": ("", "", "\n"), "CRLF": ("", "\r\n", "\r\n"),
    "CRLF, none at the end": ("", "", "\r\n"), "blank lines": ("\n\n", "\n\n\n", "\n"),
    "byte-order mark": ("\ufeff", "\n", "\n"), "form feed": ("\n\f\n", "\n\f", "\n"), "old Mac": ("", "\r", "\r"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_around_the_code_stays(program, tmp_path, capsys, form):
    """Stops a diff full of line endings, and a file that comes back without its mark, blank lines or last newline."""
    head, tail, ending = FORMS[form]
    whole = lambda code: (head + code.replace("\n", ending) + tail).encode()
    assert program(whole(OLD), NEW) == 1 and (tmp_path / "old.py").read_bytes() == whole(OLD)
    changed = [line for line in capsys.readouterr().out.split("\n")[2:] if line[:1] in "+-" and line]
    assert form == "old Mac" or [line.strip() for line in changed] == ["-x = np.in1d(a, b)", "+x = np.isin(a, b)"]
    assert program(whole(OLD), NEW, "--write") == 1 and (tmp_path / "old.py").read_bytes() == whole(NEW)
    assert program(whole(OLD), OLD) == 0 and (tmp_path / "old.py").read_bytes() == whole(OLD)


@pytest.mark.skipif(not shutil.which("patch"), reason="patch is the oracle")
@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("new", [NEW, OLD + "\nz = 3", "import np\nx = '\f'\ny = x", OLD.replace("\ny = x", "")])
def test_patch_takes_the_diff(program, tmp_path, capsys, end, new):
    """Stops a diff that other programs do not take, at the end of a file without a last newline say."""
    assert program((OLD + end).encode(), new) == 1
    diff = capsys.readouterr().out
    subprocess.run(["patch", "-p0"], input=diff.encode(), cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "old.py").read_text() == new + end


def test_write_keeps_a_copy(program, tmp_path, capsys):
    """Stops --write from taking an older copy with it, or from touching anything where nothing changes."""
    contents = [f"{OLD}\n# {i}\n".encode() for i in range(3)]
    for content in contents:
        assert program(content, NEW, "--write") == 1
    copies = [(tmp_path / f"old.py.bak{number}").read_bytes() for number in ("", "1", "2")]
    assert copies == contents and (tmp_path / "old.py").read_bytes() == f"{NEW}\n".encode()
    assert "old.py.bak2" in capsys.readouterr().err
    assert program(None, NEW, "--write") == 0 and len(list(tmp_path.iterdir())) == 4


def test_write_through_a_link(program, tmp_path):
    """Stops a link from becoming a file of its own, and a script from losing its rights."""
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "code.py"
    real.write_text(OLD + "\n")
    real.chmod(0o750)
    (tmp_path / "link.py").symlink_to("real/code.py")
    assert program(None, NEW, "--write", file="link.py") == 1
    assert (tmp_path / "link.py").is_symlink() and real.read_text() == NEW + "\n"
    for file in (real, real.with_name("code.py.bak")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o750
    assert sorted(path.name for path in real.parent.iterdir()) == ["code.py", "code.py.bak"]


@pytest.mark.parametrize("step", ["fsync 1", "fsync 2", "replace", "copymode"])
def test_a_full_disk_harms_nothing(program, tmp_path, monkeypatch, step):
    """Stops half a file, or one left beside, when the disk is full or the rights cannot be set."""
    owner, _, number = step.partition(" ")
    module, calls = shutil if owner == "copymode" else os, []
    real = getattr(module, owner)

    def fail(*args):
        calls.append(args)
        if len(calls) == int(number or 1):
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(module, owner, fail)
    with pytest.raises(BadInput, match="cannot write .*old.py: No space left .*as it was"):
        program(OLD.encode(), NEW, "--write")
    assert (tmp_path / "old.py").read_text() == OLD
    left = {path.name for path in tmp_path.iterdir()} - {"old.py"}
    assert left == ({"old.py.bak"} if step == "replace" else set())


def test_a_file_that_changes_meanwhile(program, tmp_path, monkeypatch):
    """Stops --write from undoing what the user typed while the model was at work."""
    real = migrate.migrate
    edit = lambda *args: (tmp_path / "old.py").write_text("mine = 1\n") and real(*args)
    monkeypatch.setattr(migrate, "migrate", edit)
    with pytest.raises(BadInput, match="changed while"):
        program(OLD.encode(), NEW, "--write")
    assert (tmp_path / "old.py").read_text() == "mine = 1\n"


BAD = [  # content, flags, what the message must say
    (b"x = '\xff'", [], "not UTF-8 at byte 5"), (b"", [], "no code"), (b"\n# only this\n", [], "no code"),
    (b"print 'two'", [], "does not parse"), (b"x = 1\0", [], "does not parse"), (b"x = 1\r\ny = 2\n", [], "dos2unix"),
    (b'"""\n```\n"""', [], "``` at the start"), (b"x = '</answer>'", [], "</answer>"),
    (OLD.encode(), ["--update", " "], "the update: empty"), (OLD.encode(), ["--update-file", "none"], "none: cannot"),
    (OLD.encode(), ["--update", "a", "--update-file", "b"], "not allowed with"),
    (OLD.encode(), ["--update-file", "latin"], "latin: not UTF-8"), (OLD.encode(), ["--library", ""], "--library"),
    (OLD.encode(), ["--num-samples", "0"], "--num-samples"), (OLD.encode(), ["--temperature", "-1"], "--temperature"),
    (OLD.encode(), ["--max-prompt-tokens", "9"], "-tokens 9 at most"), (OLD.encode(), ["--model", "none"], "no directory"),
    (OLD.encode() * 800, [], "no room"), (OLD.encode(), ["--max-new-tokens", "4090"], "no room"),
    (OLD.encode(), ["--seed", "-1"], "--seed"),
]  # fmt: skip


@pytest.mark.parametrize("content, flags, word", BAD, ids=[word for *_, word in BAD])
def test_bad_input(program, tmp_path, content, flags, word):
    """Stops a traceback, or minutes of sampling, for a mistake that shows at once; the file stays as it is."""
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    content = content if content != OLD.encode() * 800 else (OLD + "\n").encode() * 800
    with pytest.raises(BadInput) as error:
        program(content, NEW, "--write", *flags)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "old.py").read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"old.py", "latin"}


def test_bad_files(program, tmp_path, monkeypatch):
    """Stops a traceback for a file that is none, or that may not be written, or for flags that exclude each other."""
    with pytest.raises(BadInput, match="none.py: cannot be read: No such file"):
        program(None, NEW, file="none.py")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        program(None, NEW, file=".")
    with pytest.raises(BadInput, match="--write: there is no file"):
        program(None, NEW, "--write", file="-")
    with pytest.raises(BadInput, match="one of the arguments --update --update-file is required"):
        migrate.main(["old.py", "--library", "np", "--version", "2"])
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anything
    monkeypatch.setattr(loading, "load_policy", lambda *_: pytest.fail("looked at the rights too late"))
    with pytest.raises(BadInput, match="no right to write"):
        program(OLD.encode(), NEW, "--write")


def test_no_usable_answer(program, tmp_path, capsys):
    """Stops an exit status that takes no answer for no change, or an answer that says nothing of the way out."""
    assert program(OLD.encode(), "x = (", "--write") == 3 and (tmp_path / "old.py").read_text() == OLD
    out, err = capsys.readouterr()
    assert out == "" and "no answer is usable" in err and "2 that do not parse" in err and "--seed" in err


def test_json(program, tmp_path, capsys):
    """Stops output that another program cannot read, in all three cases."""
    for code, status in ((NEW, 1), (OLD, 0), ("x = (", 3)):
        assert program((OLD + "\n").encode(), code, "--json", "--num-samples", "2") == status
        found = json.loads(capsys.readouterr().out)
        assert found["changed"] == bool(found["diff"]) == (status == 1) and found["answers"] == 2
        assert found["code"] == (None if status == 3 else code + "\n")
        assert found["library"] == "np" and found["usable"] == (0 if status == 3 else 2) and found["backup"] is None


def test_greedy_is_one_answer(program, monkeypatch, capsys):
    """Stops eight equal answers from passing for agreement, and settings from getting lost on their way."""
    seen = []
    monkeypatch.setattr(migrate, "migrate", lambda m, t, e, *settings: seen.append(settings) or (NEW, ZERO))
    assert program(OLD.encode(), None, "--temperature", "0", "--max-new-tokens", "7", "--seed", "3") == 1
    assert program(OLD.encode(), None, "--max-new-tokens", "7", "--num-samples", "5") == 1
    assert seen == [(1, 7, 0.0, 3), (5, 7, 0.8, 42)] and "agreement" not in capsys.readouterr().err


def test_room_for_the_answer(program, tmp_path, tokenizer, monkeypatch):
    """Stops an answer from being cut because the file is longer than what the model was trained on."""
    seen = []
    monkeypatch.setattr(migrate, "migrate", lambda m, t, e, n, new, *more: seen.append(new) or (NEW, ZERO))
    long, longer = ("\n".join(f"x = lib.call_{i}(a)" for i in range(count)) for count in (60, 99))
    for content in (OLD, long, longer):
        assert program(content.encode(), None) == 1
    prompt = data.encode_prompt(data.Example("np", "2.0", "", "in1d is now isin", longer, ""), tokenizer)
    assert seen == [1024, 2 * len(tokenizer.encode(long)), 4096 - len(prompt)]
    assert seen[1] > 1024 and len(tokenizer.encode(longer)) < seen[2] < 2 * len(tokenizer.encode(longer))


def test_stdin_and_notes_from_a_file(program, tmp_path, monkeypatch, capsys):
    """Stops notes or code from getting lost on their way into the prompt, which is that of training."""
    seen = []
    monkeypatch.setattr(migrate, "migrate", lambda m, t, example, *more: seen.append(example) or (NEW, ZERO))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((OLD + "\r\n").replace("\n", "\r\n").encode())))
    (tmp_path / "notes").write_text("\nin1d is gone.\nUse isin.\n")
    with pytest.raises(BadInput, match="mixes"):
        program(None, None, "--update-file", "notes", file="-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((OLD + "\n").replace("\n", "\r\n").encode())))
    assert program(None, None, "--update-file", "notes", "--version", "==2.1", file="-") == 1
    assert seen == [data.Example("np", "2.1", "", "in1d is gone.\nUse isin.", OLD, "")]
    assert "--- stdin\n+++ stdin\n" in capsys.readouterr().out


ZERO = {"answers": 1, "usable": 1, "without_code": 0, "not_parsed": 0, "cut": 0, "agreement": None}


# ------------------------------------------------------------------------- the model


@pytest.fixture
def trained(tmp_path, tokenizer, monkeypatch):
    """A run directory project/runs/one, whose base is the relative path "base"; its adapter does something."""
    project = tmp_path / "project"
    model = random_model("qwen2", len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(project / "base")
    tokenizer.save_pretrained(project / "base")
    config = grpo.Config(model="base", output="runs/one", r=4, alpha=8.0, dropout=0.0, max_new_tokens=7)
    dora.add_dora(model, 4, 8.0, 0.0, "q_proj,v_proj")
    with torch.no_grad():
        for layer in dora.dora_layers(model).values():
            layer.lora_B.normal_(std=0.5)
    dora.save_adapter(model, config, project / "runs/one/adapter")
    (project / "runs/one/config.json").write_text(json.dumps(vars(config)))
    return project / "runs/one", model


@pytest.mark.parametrize("place", [".", "project", "project/runs/one"])
def test_run_directory(trained, tmp_path, monkeypatch, place):
    """Stops the untrained base from answering, and a run that is only found from where it was started."""
    path, model = trained
    monkeypatch.chdir(tmp_path / place)
    (tmp_path / "base").mkdir()  # another project's
    base, adapter, settings = loading.open_policy(os.path.relpath(path))
    assert settings["max_new_tokens"] == 7
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(loading.load_policy(base, adapter)(ids).logits, model.eval()(ids).logits)
    assert not torch.allclose(loading.load_policy(base, "")(ids).logits, model(ids).logits)


def test_full_model_of_a_run(trained):
    """Stops a fully trained run, which has no adapter, from being taken for a checkpoint without a tokenizer."""
    path, _ = trained
    shutil.rmtree(path / "adapter")
    shutil.move(path.parent.parent / "base", path / "model")
    base, adapter, _ = loading.open_policy(str(path))
    assert (base, adapter) == (str(path / "model"), "") and loading.load_tokenizer(base)
    assert loading.open_policy("acme/model") == ("acme/model", "", {})
    assert loading.open_policy(str(ROOT / "tiny"))[2]["max_new_tokens"] == 64


def test_an_adapter_of_another_model(trained, checkpoints):
    """Stops a traceback where the base has been replaced since, or the adapter is damaged."""
    path, _ = trained
    with pytest.raises(BadInput, match="does not fit"):
        loading.load_policy(str(ROOT / "tiny"), str(path / "adapter"))
    weights = path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadInput, match="does not fit"):
        loading.load_policy(checkpoints["qwen2"], str(path / "adapter"))


def test_as_a_program(tmp_path, monkeypatch, capsys):
    """Stops a first try without --model from leaving the user in the dark, or bad input from passing for a change."""
    row = json.loads((ROOT / "tiny" / "heldout.jsonl").read_text().splitlines()[3])
    (tmp_path / "old.py").write_text(row["old_code"] + "\n")
    command = [sys.executable, str(ROOT / "migrate.py"), "old.py", "--library", row["dependency"]]
    command += ["--version", row["new_version"], "--update", row["update_info"], "--num-samples", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, 1, 3) and "toy answers, which knows made-up libraries only" in done.stderr
    assert "Traceback" not in done.stderr and bool(done.stdout) == (done.returncode == 1)
    monkeypatch.setattr(sys, "argv", [*command[1:], "--nothing"])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(migrate.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
