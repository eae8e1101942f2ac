"""The formula for memory against real models, what it decides, --dry-run, out of memory."""

import json
import weakref

import pytest
import torch
from conftest import random_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

import grpo
from tools import plan
import recode
import rollout
import data
import dora
from lib import loading
from lib import parallel
from lib.config import BadInput
from training import memory


def shape_of(config, rank=64):
    """plan.shape() for a transformers config."""
    d, n, f = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    q, k = head * config.num_attention_heads, head * config.num_key_value_heads
    return plan.shape(d, n, f, q, k, config.vocab_size, config.tie_word_embeddings, rank)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted(family, tied):
    """Stops a formula that miscounts weights; it may omit norms and biases, 2 % at most."""
    sizes = {"hidden_size": 128, "intermediate_size": 320}
    model = random_model(family, 500, tie_word_embeddings=tied, **sizes)
    real = sum(p.numel() for p in model.parameters())
    assert 0.98 * real <= shape_of(model.config).W <= real
    adapted = dora.add_dora(model, 64, 64.0, 0.0, "q_proj,v_proj")
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape_of(model.config, 64).A == trained
    counted = vars(memory.shape_of(adapted)) | {"W": shape_of(model.config, 64).W}
    assert counted == vars(shape_of(model.config, 64))


BILLIONS = {"0.5B": 0.494, "1.5B": 1.544, "7B": 7.616, "14B": 14.77, "32B": 32.76}


@pytest.mark.parametrize("name", BILLIONS)
def test_sizes_are_those_of_the_model_cards(name):
    """Stops a wrong width or number of layers in the table; the counts are Qwen's own."""
    assert plan.shape(*plan.SIZES[name]).W == pytest.approx(BILLIONS[name] * 1e9, rel=0.01)


SMALL = plan.shape(d=10, n=1, f=30, q=10, k=5, V=100, tied=True)
SMALL.W, SMALL.A = 1000, 50  # round numbers


def test_memory_by_hand():
    """Stops a term that is counted twice or not at all: every part of one layer by hand."""
    x = SMALL
    config = grpo.Config(num_samples=2, max_new_tokens=8, micro_tokens=16)
    parts = memory.memory(x, config, 4, 3, b=2, logits=7)
    assert parts["weights"] == 2000 and parts["trained"] == 800
    assert parts["sampling"] == 2 * (2 * 1 + 1) * 5 * 3 * 2 * (4 + 8) + 16 * 3 * 2 * 100
    held = 11 * 10 + 3 * 30  # values that a layer keeps per token
    layer = 2 * (held * 16 + 2 * 5 * (2 * 4 + 16))  # two completions that share 16 tokens
    back = 2 * (2 * 10 + 3 * 30) * 16  # and those of its backward pass
    assert parts["training"] == 2 * (10 * (4 + 16) + 4 * 5 * 4) + layer + back + 16 * 7
    assert parts["peak"] == 2800 + max(parts["sampling"], parts["training"])
    config.keep_activations = True
    kept = memory.memory(x, config, 4, 3, b=2, logits=7)
    assert kept["training"] == 2 * held * 4 + layer + back + 16 * 7
    for config.micro_tokens in (8, 4):  # one completion at a time, at least; or both, if short
        half = 2 * (held * 8 + 2 * 5 * (2 * 4 + 8)) + back / 2
        found = memory.memory(x, config, 4, 3, b=2, logits=7)["training"]
        assert found == 2 * held * 4 + half + 16 * 7
    full = grpo.Config(adapter="none", beta=0.0)
    assert memory.memory(x, full, 4, 1, N=4)["trained"] == 4000 + 12 * 1000 / 4


@pytest.mark.parametrize("adapter", ["dora", "none"])
def test_memory_in_fp32(adapter):
    """Stops fp32 from being counted as bf16, and the trained part, always fp32, from doubling."""
    config = grpo.Config(num_samples=2, max_new_tokens=8, micro_tokens=16)
    config.adapter = adapter
    half = memory.memory(SMALL, config, 4, 3, b=2, logits=7)
    full = memory.memory(SMALL, config, 4, 3, b=4, logits=7)
    assert full["weights"] == 2 * half["weights"] == 4000
    assert full["trained"] == half["trained"] == (800 if adapter == "dora" else 16_000)
    logits = 16 * 3 * 2 * 100  # always fp32
    assert full["sampling"] - logits == 2 * (half["sampling"] - logits)
    assert full["training"] - 16 * 7 == 2 * (half["training"] - 16 * 7)


def test_plan_is_a_program(capsys):
    """Stops --help from printing the table, and a table that lacks a row or a column."""
    with pytest.raises(SystemExit) as stop:
        plan.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--dry-run" in printed and "eq. 6" in printed and "| 7B |" not in printed
    assert max(map(len, printed.split("\n"))) <= 100
    with pytest.raises(BadInput, match="unrecognized arguments: 7B"):
        plan.main(["7B"])
    assert plan.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[4:]) == len(plan.SIZES)
    assert {line.count("|") for line in lines[2:]} == {6}


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are still alive, and their peak."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tree_iter(out) if isinstance(x, torch.Tensor)}:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.now, self.peak = self.now + size, max(self.peak, self.now + size)
                weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def uncounted(function):
    """`function` without a dispatch mode: a tensor subclass cannot be made inside Alive."""

    def call(*args):
        with _disable_current_modes():
            return function(*args)

    return call


def model_of(layers):
    """A small bf16 model with a DoRA, as on a GPU."""
    sizes = {"hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 8}
    model = random_model("qwen2", num_hidden_layers=layers, **sizes).bfloat16()
    return dora.add_dora(model, 4, 4.0, 0.01, "q_proj,v_proj")


@pytest.mark.parametrize("layers", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("prompts", [1, 3])
def test_training_memory_matches_the_tensors_alive(layers, keep, prompts, monkeypatch):
    """Stops a formula that omits what a layer holds, or counts all layers with checkpointing."""
    model = model_of(layers)
    if not keep:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(recode, "causal_lower_right", uncounted(recode.causal_lower_right))
    config = grpo.Config(num_samples=8, max_new_tokens=64, micro_tokens=512, beta=0.0)
    config.keep_activations = keep
    tokens = torch.randint(4, 97, (prompts, 8, 64)).tolist()
    groups = [rollout.Group([5] * 64, None, completions) for completions in tokens]
    batch = rollout.make_batch(groups, torch.randn(prompts, 8), "cpu")
    with Alive(model) as alive:
        grpo.accumulate(model, batch, config)
    formula = memory.memory(shape_of(model.config, 4), config, 64, prompts, b=2, logits=0)
    assert 0.9 <= formula["training"] / alive.peak <= 1.1


def kept(model, adapter="dora"):
    """(bytes of a training pass that keeps activations, those of the formula)."""
    config = grpo.Config(num_samples=8, max_new_tokens=64, micro_tokens=512, beta=0.0)
    config.keep_activations = True
    config.adapter = adapter
    groups = [rollout.Group([5] * 64, None, torch.randint(4, 97, (8, 64)).tolist())]
    batch = rollout.make_batch(groups, torch.randn(1, 8), "cpu")
    with Alive(model) as alive:
        grpo.accumulate(model, batch, config)
    b = model.dtype.itemsize
    formula = memory.memory(memory.shape_of(model), config, 64, 1, b=b, logits=0)
    return alive.peak, formula["training"]


ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.mark.parametrize("targets", ["q_proj,v_proj", ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_formula_is_not_below_what_is_kept(targets, dtype, monkeypatch):
    """Stops activations from being kept that do not fit: an adapter on every layer keeps twice."""
    monkeypatch.setattr(recode, "causal_lower_right", uncounted(recode.causal_lower_right))
    sizes = {"hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 8}
    model = random_model("qwen2", num_hidden_layers=4, **sizes).to(dtype)
    found, formula = kept(dora.add_dora(model, 4, 4.0, 0.01, targets))
    assert found <= formula <= 1.3 * found


MEMORY = {"little": 1e8, "much": 1e10}


@pytest.mark.parametrize(
    "given, little, much", [("", False, True), ("--", True, True), ("--no-", False, False)]
)
def test_activations_are_kept_where_they_fit(
    given, little, much, checkpoints, write_rows, rows, tmp_path, monkeypatch, capsys
):
    """Stops a run that runs out of memory although it could recompute, or a flag without effect."""
    seen = []
    monkeypatch.setattr(grpo.training.dry_run, "dry_run", lambda model, *_: seen.append(model) or 0)
    flags = f"--model {checkpoints['qwen2']} --data {write_rows(rows)} --output {tmp_path}/run"
    flags += " --dry-run" + (f" {given}keep-activations" if given else "")
    for free, keep in (("little", little), ("much", much)):
        monkeypatch.setattr(memory, "free_memory", lambda device: MEMORY[free])
        assert grpo.main(flags.split()) == 0
        assert seen[-1].is_activation_checkpointing is not keep
        line = f"activations {'kept' if keep else 'recomputed'}: "
        line += "as the flag says" if given else "need "
        assert line in capsys.readouterr().out
    monkeypatch.setattr(parallel, "any_rank", lambda flag: True)  # on another rank they do not fit
    assert grpo.main(flags.split()) == 0
    assert seen[-1].is_activation_checkpointing is not little


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [1, 3])
def test_sampling_memory_matches_the_tensors_alive(prompts):
    """Stops a formula that counts a prompt's KV cache once per group, or omits a copy of it."""
    model = model_of(8)
    config = grpo.Config(num_samples=4, max_new_tokens=256)
    with Alive(model) as alive:
        recode.sample(model, [[5] * 64] * prompts, 4, 256, [], 1.0, 0)
    formula = memory.memory(shape_of(model.config, 4), config, 64, prompts, b=2)["sampling"]
    assert 0.9 <= formula / alive.peak <= 1.2


@pytest.mark.parametrize(
    "more", ["", "--adapter lora --keep-activations", "--adapter none --beta 0"]
)
def test_dry_run(more, checkpoints, write_rows, rows, tmp_path, monkeypatch, capsys):
    """Stops a dry run that tries less than the worst case, or that touches a run directory."""
    rows[3]["old_code"] += "\ny = 1" * 20
    seen, real = [], recode.sample
    monkeypatch.setattr(recode, "sample", lambda *args: seen.append(args) or real(*args))
    output = tmp_path / "run"
    output.mkdir()
    (output / "keep").write_text("mine")
    flags = f"--model {checkpoints['qwen2']} --data {write_rows(rows)} --output {output} --dry-run "
    flags += f"--prompts-per-step 2 --num-samples 3 --max-new-tokens 8 --r 4 --steps 7200 {more}"
    assert grpo.main(flags.split()) == 0
    [(_, prompts, num_samples, T, eos, *_)] = seen
    assert len(prompts) == 2 and num_samples == 3 and T == 8 and eos == []
    tokenizer = loading.load_tokenizer(checkpoints["qwen2"])
    longest = max(
        len(data.encode_prompt(e, tokenizer)) for e in data.load_examples(write_rows(rows))
    )
    assert {len(prompt) for prompt in prompts} == {longest}
    printed = capsys.readouterr().out
    assert "7,200 steps" in printed and "h at most" in printed and "peak" in printed
    assert [path.name for path in output.iterdir()] == ["keep"]


def test_out_of_memory_says_what_to_do(monkeypatch, capsys):
    """Stops a traceback, and advice without a flag, where a smaller micro-batch would fit."""

    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("sys.argv", ["grpo.py"])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith(
        "error: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    for flag in (
        "--micro-tokens",
        "--no-keep-activations",
        "--num-samples",
        "--dry-run",
        "--resume",
    ):
        assert flag in printed
    assert "more" not in printed.split("\n")[0]


def test_large_models_are_written_in_shards(checkpoints, tmp_path, monkeypatch):
    """Stops a single file of many gigabytes, and shards that do not load as the same model."""
    monkeypatch.setattr(loading, "SHARD", "100KB")
    model = loading.load_model(checkpoints["llama"])
    loading.write_model(model, loading.load_tokenizer(checkpoints["llama"]), tmp_path)
    parts = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (
        len(parts) > 2
        and json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    )
    again = loading.load_model(str(tmp_path))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
