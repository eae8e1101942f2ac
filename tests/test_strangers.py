"""What strangers ran into: odd models, lost or mixed runs, dead ends. One clear line each."""

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, random_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    MistralConfig,
    NanoChatConfig,
    StableLmConfig,
)

import eval
import grpo
import recode
import reward
from lib import loading, parallel
from training import run, setup
from lib.config import BadInput, open_policy

SMALL = (
    "--prompts-per-step 2 --num-samples 2 --max-new-tokens 8 --r 4 --save-every 2 --quiet".split()
)


@pytest.fixture
def train(tmp_path, checkpoints, write_rows, rows, monkeypatch):
    """train(*flags): a small GRPO run into tmp_path/run; the exit status. Rewards differ."""
    spread = lambda grade, example, kind: sum(map(ord, grade.completion)) % 7 - 3.0
    monkeypatch.setattr(reward, "total", spread)
    fixed = ["--model", checkpoints["qwen2"], "--data", write_rows(rows)]

    def start(*flags):
        argv = [*fixed, "--output", str(tmp_path / "run"), *SMALL, *flags]
        monkeypatch.setattr(sys, "argv", ["grpo.py", *argv])
        return grpo.main(argv)

    return start


def steps(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


# ------------------------------------------------------------------------- models

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip


def words(count):
    """A tokenizer of so many words, as far as check_policy looks."""
    return range(count)


@pytest.mark.parametrize(
    "config, message",
    [
        (NanoChatConfig(**SIZES, final_logit_softcapping=0.5), "nanochat: log-prob.* differ"),
        (HyperCLOVAXConfig(**SIZES, logits_scaling=8.0), "hyperclovax: log-probabilities differ"),
        (MistralConfig(**SIZES, sliding_window=16), "mistral with a sliding window"),
        (StableLmConfig(**SIZES), "stablelm has an attention that cannot be replaced"),
    ],
    ids=["soft cap", "unknown scaling", "window", "attention"],
)
def test_models_whose_logits_differ(config, message):
    """Stops a model with capped logits or an attention window from being trained on wrong numbers.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with pytest.raises(BadInput, match=message):
        setup.check_policy(model, words(97), "some/model")


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(**SIZES, logits_scaling=8.0), CohereConfig(**SIZES, logit_scale=0.25)],
    ids=["granite", "cohere"],
)
def test_models_whose_logits_are_scaled(config):
    """Stops logits without Granite's or Cohere's factor, in the sampler or in the trainer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    setup.check_policy(model, words(97), "some/model")
    prompt = [5, 6, 7, 8, 9]
    tokens, mask, sampled = recode.sample(model, [prompt], 3, 12, [3], 0.7)
    logps = recode.token_logps(model, [prompt] * 3, tokens, mask, 0.7).detach()
    for row, kept, ours, drawn in zip(tokens, mask, logps, sampled):
        completion = row[kept]
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), completion])[None]).logits[0, 4:-1]
        theirs = (logits / 0.7).log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        torch.testing.assert_close(ours[kept], theirs, atol=1e-4, rtol=0)
        torch.testing.assert_close(drawn[kept], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_models_whose_logits_agree(family):
    """Stops a check so strict that it refuses a model that works."""
    setup.check_policy(random_model(family), words(97), "some/model")
    with pytest.raises(BadInput, match="has 97 embeddings, but its tokenizer has 98 tokens"):
        setup.check_policy(random_model(family), words(98), "some/model")


@pytest.mark.parametrize("fault", ["missing", "mismatched", "not finite"])
def test_weights_that_are_not_there(checkpoints, tmp_path, fault):
    """Stops a checkpoint with missing, misshapen or NaN weights from being trained all the same."""
    path = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "mismatched":
        tensors[name] = tensors[name][:5].clone()
    else:
        tensors[name][3, 4] = torch.nan
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=rf"model: .*model.layers.1.mlp.up_proj|model: .*{fault}"):
        loading.load_model(str(path))


def test_learned_positions_end(checkpoints, train, tmp_path, tokenizer, capsys):
    """Stops an index error in the middle of a run with GPT-2, and silence where RoPE is stretched.
    """
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=200)
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--model", str(tmp_path / "gpt2"), "--adapter", "none", "--beta", "0", "--steps", "1"]
    with pytest.raises(BadInput, match="--max-new-tokens: up to .* the context is 200"):
        train(*flags, "--max-new-tokens", "150")
    evaluation = ["--model", str(tmp_path / "gpt2"), "--data", str(ROOT / "tiny" / "heldout.jsonl")]
    with pytest.raises(BadInput, match="--max-new-tokens: up to .* the context is 200"):
        eval.main([*evaluation, "--output", str(tmp_path / "e"), "--max-new-tokens", "150"])
    setup.check_context(random_model("qwen2"), [[5] * 200], grpo.Config(max_new_tokens=4000))
    assert re.search("warning .*the context is 4,096", capsys.readouterr().out)


LONG = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "factor": 4.0}
LLAMA = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {"default": {}, "linear": {"factor": 2.0}, "yarn": {"factor": 4.0}, "llama3": LLAMA}
ROPES |= {"dynamic": {"factor": 2.0}, "longrope": LONG}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_that_depends_on_the_length(kind):
    """Stops a model whose sampler and trainer differ beyond the original context, 80 tokens here.

    Oracle: whatever is let through gives the same log-probabilities in both.
    """
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    context = 80 if kind == "dynamic" else 320
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = 80
    model = random_model("llama", max_position_embeddings=context, rope_parameters=rope)
    setup.check_policy(model, words(97), "some/model")
    prompt = list(range(5, 60))
    found = []
    for count in (25, 26, 60):
        try:
            setup.check_context(model, [[5], prompt], grpo.Config(max_new_tokens=count))
        except BadInput as error:
            assert f"--max-new-tokens: up to {55 + count} tokens" in str(error)
            assert "the context is 80;" in str(error)
            continue
        found.append(count)
        tokens, mask, sampled = recode.sample(model, [prompt], 2, count, [])
        logps = recode.token_logps(model, [prompt] * 2, tokens, mask).detach()
        torch.testing.assert_close(sampled, logps, atol=1e-4, rtol=0)
    assert found == ([25] if kind in ("dynamic", "longrope") else [25, 26, 60])
    limits = {"dynamic": 80, "longrope": 80}
    assert setup.exact_length(model.config) == limits.get(kind, math.inf)
    model.config.rope_parameters = {"full_attention": rope}  # for each type of layer
    assert setup.exact_length(model.config) == limits.get(kind, math.inf)


@pytest.mark.parametrize("adapter", ["dora", "lora", "none"])
def test_training_goes_on_from_a_run(train, tmp_path, monkeypatch, adapter):
    """Stops a run that starts again from the base model, or that others cannot load afterwards.

    Oracle: with a learning rate too small for fp32, the second run ends as the first one did.
    """
    full = ["--adapter", adapter, "--beta", "0", "--targets", "q_proj", "--r", "4", "--lr", "0.01"]
    assert train(*full, "--steps", "2") == 0
    first, second = str(tmp_path / "run"), str(tmp_path / "next")
    monkeypatch.chdir(tmp_path)
    more = ["--model", "run", "--beta", "0", "--lr", "1e-30", "--output", second, "--steps", "1"]
    more += ["--adapter", "none"] if adapter == "none" else ["--dropout", "0.5"]
    assert train(*more) == 0
    monkeypatch.chdir(Path(second) / "checkpoint")  # paths are relative to where a run began
    ids = torch.arange(5, 25)[None]
    found = []
    for run_ in (first, second):
        base, directory, _ = open_policy(run_)
        found.append(loading.load_policy(base, directory)(ids).logits)
    base = loading.load_model(json.loads((tmp_path / "run/config.json").read_text())["model"])
    assert torch.equal(*found) and not torch.allclose(found[0], base(ids).logits)
    if adapter != "none":
        settings = json.loads((tmp_path / "next/adapter/adapter_config.json").read_text())
        assert settings["r"] == 4 and settings["target_modules"] == ["q_proj"]
        assert settings["base_model_name_or_path"] == base.config.name_or_path


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_the_reference_is_where_training_began(train, tmp_path, adapter):
    """Stops a KL penalty that pulls a run back to what was there before the run it goes on from."""
    fixed = ["--adapter", adapter, "--r", "4", "--dropout", "0", "--beta", "0.1", "--lr", "0.01"]
    fixed += ["--steps", "2"]
    assert train(*fixed) == 0
    more = ["--model", str(tmp_path / "run"), "--output", str(tmp_path / "next")]
    assert train(*fixed, *more) == 0
    for name in ("run", "next"):
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        kl = [json.loads(row)["kl"] for row in rows]
        assert kl[0] == 0 and 0 < kl[1] < 1


def test_a_run_keeps_its_adapter(train, tmp_path):
    """Stops a rank or a kind of adapter that the run to go on from does not have."""
    assert train("--steps", "1", "--r", "4") == 0
    more = ["--model", str(tmp_path / "run"), "--output", str(tmp_path / "next")]
    for flag, value in (("--r", "8"), ("--adapter", "none")):
        with pytest.raises(BadInput, match=f"{flag} {value}: the adapter of .*run has"):
            train(*more, "--beta", "0", flag, value)


def test_chat_templates(train, checkpoints, tmp_path, tokenizer):
    """Stops a traceback where a template refuses the system role, is malformed or empty."""
    path = shutil.copytree(checkpoints["qwen2"], tmp_path / "model")
    template = (path / "chat_template.jinja").read_text()
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (path / "chat_template.jinja").write_text(refuse + template)
    assert train("--model", str(path), "--steps", "1") == 0
    for broken, word in (("{% for m in %}", "does not work"), ("{{ '' }}", "drops or changes")):
        (path / "chat_template.jinja").write_text(broken)
        with pytest.raises(BadInput, match=f"chat template {word}"):
            train("--model", str(path), "--steps", "1", "--output", str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["runs/none", "./none/model", "tests/none"])
def test_a_mistyped_path_is_reported_at_once(name, monkeypatch):
    """Stops 46 seconds of silence and a hub error for a directory that is not there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        loading.AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("asked the hub")
    )
    with pytest.raises(BadInput, match=f"no directory '{name}'"):
        loading.load_tokenizer(name)


@pytest.mark.parametrize("inside", ["", "Qwen2.5-Coder-0.5B/tokenizer.json"])
def test_a_directory_with_the_name_of_an_owner(tmp_path, monkeypatch, inside):
    """Stops "no directory" for a hub id, where an earlier download has made a directory Qwen/."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", asked.append)
    (tmp_path / "Qwen" / inside).mkdir(parents=True)
    with pytest.raises(AttributeError):  # what from_pretrained returns here is no tokenizer
        loading.load_tokenizer("Qwen/Qwen2.5-Coder-7B-Instruct")
    assert asked == ["Qwen/Qwen2.5-Coder-7B-Instruct"]
    with pytest.raises(BadInput, match="no directory 'Qwen/a/b'"):
        loading.load_tokenizer("Qwen/a/b")


# ------------------------------------------------------------------------- runs

HOLD = "import sys, pathlib, time; sys.path.insert(0, '.'); from lib.files import lock; "
HOLD += "held = lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_one_process_per_output(train, tmp_path):
    """Stops two processes from writing into each other's logs, also with --resume."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=f"in use by process {holder.pid}"):
            train("--steps", "1")
    finally:
        holder.kill()
        holder.wait()
    assert train("--steps", "1") == 0 and train("--steps", "2", "--resume") == 0


@pytest.mark.parametrize("moment", ["held-out", "first save"])
def test_stopped_before_the_first_checkpoint(train, tmp_path, monkeypatch, moment):
    """Stops a run directory that can be neither resumed nor started again."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "held-out":
            patch.setattr(run, "measure_heldout", die)
        else:
            patch.setattr(run.RunDirectory, "save", die)
        train("--steps", "2", "--heldout", "0.34")
    assert train("--steps", "2", "--heldout", "0.34", "--resume") == 0
    assert steps(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("how", ["shortened", "deleted"])
def test_logs_that_have_lost_rows(train, tmp_path, name, how):
    """Stops NUL bytes in a log that was shortened or deleted before --resume."""
    assert train("--steps", "2") == 0
    log = tmp_path / "run" / name
    before = log.read_bytes()
    log.unlink()
    if how == "shortened":
        log.write_bytes(before[:-5])
    with pytest.raises(BadInput, match=f"{name} has lost rows"):
        train("--steps", "3", "--resume")
    log.write_bytes(before)
    assert train("--steps", "3", "--resume") == 0


def test_resume_with_other_steps(train, tmp_path, capsys):
    """Stops a learning rate that leaves its schedule without a word."""
    assert train("--steps", "2") == 0
    assert train("--steps", "3", "--resume") == 0
    assert "warning   --steps was 2, now 3: the learning rate" in capsys.readouterr().out
    assert train("--steps", "3", "--resume") == 0
    assert "--steps was" not in capsys.readouterr().out


def test_resume_through_a_link(train, tmp_path, checkpoints):
    """Stops a run from being refused because its model is named by another path."""
    assert train("--steps", "1") == 0
    (tmp_path / "link").symlink_to(checkpoints["qwen2"])
    assert train("--steps", "2", "--resume", "--model", str(tmp_path / "link")) == 0


@pytest.mark.parametrize("output", ["runs/one", "../out", "absolute"])
def test_resume_from_another_directory(train, tmp_path, monkeypatch, checkpoints, output):
    """Stops a run from being refused because its paths are relative and it goes on elsewhere."""
    for place in ("project", "out", "tree/deep"):
        (tmp_path / place).mkdir(parents=True)
    shutil.copytree(checkpoints["qwen2"], tmp_path / "project" / "toy")
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "project")
    output = str(tmp_path / "out") if output == "absolute" else output
    monkeypatch.chdir(tmp_path / "project")
    paths = ["--data", "data.jsonl", "--heldout", "0.34", "--output", output]
    assert train("--steps", "1", "--model", "toy", *paths) == 0
    output = os.path.realpath(output)
    assert train("--steps", "2", "--model", "./toy/", *paths, "--resume") == 0
    monkeypatch.chdir(tmp_path / "tree" / "deep")
    paths = ["--data", "../../project/data.jsonl", "--heldout", "0.34", "--output", output]
    assert train("--steps", "3", "--model", "../../project/toy", *paths, "--resume") == 0
    assert steps(Path(output)) == [1, 2, 3]
    base, adapter, _ = open_policy(output)
    assert os.path.samefile(base, tmp_path / "project" / "toy") and loading.load_policy(
        base, adapter
    )
    shutil.copytree(checkpoints["qwen2"], tmp_path / "tree" / "deep" / "another")
    with pytest.raises(
        BadInput, match="--resume: model was '../../project/toy' in .*now 'another'"
    ):
        train("--steps", "4", "--model", "another", *paths, "--resume")


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--output", "x" * 300], "cannot write x"),
        (["--clip-low", "5"], "--clip-low 5.0"),
        (["--targets", "lm_head"], "--targets"),
    ],
    ids=["long name", "clip", "head"],
)
def test_odd_flags(train, flags, word, monkeypatch, tmp_path):
    """Stops a traceback, or a silent no-op, for values that make no sense."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=word):
        train("--steps", "1", *flags)


def test_nothing_was_learned(train, monkeypatch, capsys):
    """Stops a run in which all rewards were equal from ending with nothing but "done"."""
    monkeypatch.setattr(reward, "total", lambda *_: 1.0)
    assert train("--steps", "2") == 0
    assert "warning   nothing was learned: no group's rewards differed" in capsys.readouterr().out


def test_out_of_memory_on_a_cpu(monkeypatch, capsys):
    """Stops a traceback where a CPU has no memory left: the advice given on a GPU serves here too.
    """

    def main(argv):
        torch.empty(2**60)

    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and "--micro-tokens" in said


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nmore"),
]  # fmt: skip


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[-20:])
def test_out_of_memory_before_the_first_step(error, monkeypatch, capsys):
    """Stops a model that is too large from being refused for its attention, or a traceback."""

    def fail(*args):
        raise error

    monkeypatch.setattr(recode, "token_logps", fail)
    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(lambda argv: setup.check_policy(random_model("qwen2"), words(97), "x"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "attention" not in said and "--micro-tokens" in said


def status(main):
    """The exit status of a main() run as a program."""
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(main)
    return stop.value.code


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, AssertionError])
def test_a_defect_has_a_status_of_its_own(error, capsys):
    """Stops a traceback with status 1, which for migrate.py means that it has made a diff."""

    def main(argv):
        raise error("here")

    assert status(main) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and f"{error.__name__}: " in said and "here" in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_stdout_lacks(encoding, monkeypatch):
    """Stops a run that ends because a note has a character that the terminal cannot show."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert status(lambda argv: print("\xe9 \u4e2d \udc80")) is None
    shown = {"ascii": rb"\xe9 \u4e2d", "latin-1": b"\xe9 \\u4e2d", "utf-8": "\xe9 \u4e2d".encode()}
    assert written.getvalue() == shown[encoding] + b" \\udc80\n"


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin", "stdout", "stderr"]])
def test_closed_streams(closed, monkeypatch, capsys):
    """Stops an AttributeError where the shell has closed stdin, stdout or stderr, as >&- does."""

    def main(argv):
        print("a")
        print("b", file=sys.stderr)
        if argv:
            raise argv[0]
        return 5

    for error, expected in (None, 5), (BadInput("c"), 2), (KeyError("d"), 70):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["x.py", error] if error else ["x.py"])
            for name in closed:
                patch.setattr(sys, name, None)
            assert status(main) == expected
        out, err = capsys.readouterr()
        assert out == ("" if "stdout" in closed else "a\n")
        assert err.startswith("" if "stderr" in closed else "b\n")


@pytest.mark.slow
def test_all_streams_are_closed():
    """Stops a traceback or another exit status where a job starts a program without any stream."""
    code = "import sys; sys.path.insert(0, '.'); from lib import parallel; "
    code += "parallel.run_main(lambda argv: print(sys.stdin.read()) or 5)"
    command = f"{sys.executable} -c {shlex.quote(code)} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 5


def test_a_closed_pipe():
    """Stops a traceback after `| head`."""
    code = "import sys; sys.path.insert(0, '.'); from lib import parallel\n"
    code += "def main(argv):\n    for i in range(100_000):\n        print(i)\n"
    code += "parallel.run_main(main)"
    command = f"{sys.executable} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""
