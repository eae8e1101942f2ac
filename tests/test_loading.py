"""lib/loading.py: in which dtype a model is loaded, and that all of a run works in bf16 too.
"""

import json
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, SCRIPTS
from torch import nn

import grpo
import migrate
import recode
import reward
import dora
from lib import config, loading, parallel, speed
from lib.config import BadInput

TINY = str(ROOT / "tiny")
IDS = torch.arange(5, 45)[None]  # (1, 40)
ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.fixture
def half():
    """The toy in bf16, with a random DoRA adapter as if it had been trained."""
    model = loading.load_model(TINY, "bf16")
    dora.add_dora(model, 4, 8.0, 0.0, ALL)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in dora.dora_layers(model).values():
            layer.lora_A.normal_(std=0.1)
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1 + 0.2 * torch.randn_like(layer.magnitude))
    return model


# ------------------------------------------------------------------------- which dtype


@pytest.mark.parametrize(
    "large, native, expected",
    [
        (True, True, torch.bfloat16),
        (True, False, torch.float32),
        (False, True, torch.float32),
    ],
)
def test_auto(monkeypatch, large, native, expected):
    """Stops bf16 where a CPU only emulates it or a toy gains nothing, and fp32 where bf16 is fast.
    """
    size = loading.load_model(TINY).num_parameters()
    assert loading.LARGE == 100_000_000
    monkeypatch.setattr(loading, "LARGE", size - 1 if large else size)
    monkeypatch.setattr(loading, "native_bf16", lambda: native)
    assert loading.load_model(TINY).dtype == expected
    assert loading.load_policy(TINY, "").dtype == expected


@pytest.mark.parametrize(
    "avx512, amx, expected", [(0, 0, False), (1, 0, True), (0, 1, True), (1, 1, True)]
)
def test_native_bf16(monkeypatch, avx512, amx, expected):
    """Stops auto from missing one of the two kinds of bf16 arithmetic that x86 has."""
    assert loading.native_bf16() in (True, False)  # torch has both functions
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert loading.native_bf16() is expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_dtype_that_was_asked_for(dtype, tmp_path, half):
    """Stops --dtype from being ignored, and from rounding what is trained or RoPE's frequencies."""
    dora.save_adapter(half, grpo.Config(r=4, alpha=8.0, targets=ALL), tmp_path)
    model = loading.load_policy(TINY, str(tmp_path), dtype)
    for name, p in model.named_parameters():
        wanted = torch.float32 if p.requires_grad else loading.DTYPES[dtype]
        assert p.dtype == wanted, name
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dtype_that_is_none(script):
    """Stops a KeyError after the data has been read."""
    with pytest.raises(BadInput, match="--dtype 'fp16': give one of auto, fp32, bf16"):
        config.parse_config(script.Config, ["--dtype", "fp16"], "")


# ------------------------------------------------------------------------- bf16 from end to end


def test_sampler_and_trainer_agree_in_bf16(half):
    """Stops a sampler that in bf16 is off the distribution that is trained."""
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22, 23]]
    tokens, mask, logps = recode.sample(half, prompts, 3, 16, [3, 7, 11], seed=5)
    asked = [prompt for prompt in prompts for _ in range(3)]
    with torch.no_grad():
        trained = recode.token_logps(half, asked, tokens, mask)
    assert logps.dtype == trained.dtype == torch.float32
    difference = (logps - trained)[mask].abs()
    assert difference.mean() < 0.05 and difference.max() < 0.5
    assert logps[mask].std() > 1  # the tolerance is small beside what is compared


def test_dora_equals_peft_in_bf16(half, tmp_path):
    """Stops an adapter that in bf16 computes something other than PEFT's, or rounds more."""
    peft = pytest.importorskip("peft")
    dora.save_adapter(half, grpo.Config(r=4, alpha=8.0, targets=ALL), tmp_path)
    base = loading.load_model(TINY, "bf16")
    exact = loading.load_policy(TINY, str(tmp_path), "fp32")(IDS).logits
    assert (base(IDS).logits - exact).norm() > 0.3 * exact.norm()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)(IDS).logits.float()
    ours = half(IDS).logits.float()
    assert (ours - theirs).norm() < 0.02 * exact.norm()
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


@pytest.fixture
def train(tmp_path, write_rows, rows, monkeypatch):
    """train(output, *flags): a small GRPO run of the toy in bf16; its rewards differ."""
    spread = lambda grade, example, kind: sum(map(ord, grade.completion)) % 7 - 3.0
    monkeypatch.setattr(reward, "total", spread)
    fixed = (
        f"--model {TINY} --data {write_rows(rows)} --heldout= --dtype bf16 --quiet --save-every 2"
    )
    fixed += (
        " --prompts-per-step 2 --num-samples 4 --max-new-tokens 8 --r 4 --lr 0.001 --temperature 2"
    )

    def start(output, *flags):
        return grpo.main([*fixed.split(), "--output", str(tmp_path / output), *flags])

    return start


def leavings(path):
    """The rows of a run's metrics without clock times, and its checkpoint."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return rows, torch.load(path / "checkpoint" / "state.pt", weights_only=True)


@pytest.mark.parametrize("adapter", ["dora", pytest.param("none", marks=pytest.mark.slow)])
def test_resume_in_bf16(train, tmp_path, adapter, monkeypatch, capsys):
    """Stops a resume in bf16 that differs in one bit, trained weights in bf16, and another dtype.
    """
    flags = ["--adapter", adapter, "--beta", "0"]
    assert train("once", "--steps", "4", *flags) == 0
    assert "torch.bfloat16 on cpu" in capsys.readouterr().out
    log = grpo.training.run.RunDirectory.log

    def stop(self, step, *rest):
        log(self, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo.training.run.RunDirectory, "log", stop)
        train("twice", "--steps", "4", "--save-every", "1", *flags)
    assert train("twice", "--steps", "4", "--resume", *flags) == 0
    rows, saved = leavings(tmp_path / "once")
    again, saved_again = leavings(tmp_path / "twice")
    assert rows == again and len(rows) == 4 and all(row["grad_norm"] > 0 for row in rows)
    for name, x in saved["trained"].items():
        assert x.dtype == torch.float32 and torch.equal(x, saved_again["trained"][name]), name
        assert not torch.equal(x, x.bfloat16().float()), name
    with pytest.raises(BadInput, match="--resume: dtype was 'bf16' in .*, now 'fp32'"):
        train("twice", "--steps", "5", "--resume", "--dtype", "fp32", *flags)
    if adapter == "none":
        model = loading.load_model(str(tmp_path / "once" / "model"), "fp32")
        for name, p in model.named_parameters():
            assert torch.equal(p, saved["trained"][name].bfloat16().float()), name


# ------------------------------------------------------------------------- memory


def test_only_large_models_keep_freed_memory(monkeypatch):
    """Stops the toy from growing, and a large model from giving memory back at every step."""
    called = []
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: called.append(1))
    size = loading.load_model(TINY).num_parameters()
    assert called == []
    monkeypatch.setattr(speed, "LARGE", size)
    loading.load_model(TINY, "fp32")
    assert called == []
    monkeypatch.setattr(speed, "LARGE", size - 1)
    loading.load_model(TINY, "fp32")
    assert called == [1]


# ------------------------------------------------------------------------- packed weights


def packed(model):
    """For every linear layer, whether it uses a packed copy of its weights."""
    return ["forward" in vars(m) for m in model.modules() if isinstance(m, nn.Linear)]


def skip_without(dtype):
    if dtype == "bf16" and not loading.native_bf16():
        pytest.skip("this CPU has no native bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_weights_give_the_same_logits(monkeypatch, dtype):
    """Stops a lost bias, a copy that is older than the weights, and copies that stay."""
    skip_without(dtype)
    monkeypatch.setattr(speed, "LARGE", 0)
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: None)
    model = loading.load_model(TINY, dtype)
    dora.add_dora(model, 4, 8.0, 0.0, ALL)
    close = {"rtol": 0, "atol": 1e-4 if dtype == "fp32" else 0.25}  # of logits up to 20
    for rows in (1, 3, 70):
        ids = torch.arange(12 * rows).view(rows, 12) % 300
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
            expected = model(ids).logits
            with speed.packed_weights(model):
                assert all(packed(model))
                torch.testing.assert_close(model(ids).logits, expected, **close)
        assert not any(packed(model))
    with pytest.raises(KeyboardInterrupt), speed.packed_weights(model):
        raise KeyboardInterrupt
    assert not any(packed(model))


@pytest.mark.parametrize("dtype, size", [("fp32", 2_000_000_000), ("bf16", 4_000_000_000)])
def test_a_model_of_8_gb_is_not_packed(monkeypatch, dtype, size):
    """Stops a 7B model from being in a laptop's memory twice."""
    skip_without(dtype)
    model = loading.load_model(TINY, dtype)
    for parameters, expected in ((size - 1, True), (size, False)):
        monkeypatch.setattr(model, "num_parameters", lambda: parameters)
        with speed.packed_weights(model):
            assert set(packed(model)) == {expected}


def test_a_large_model_samples_from_packed_weights(monkeypatch):
    """Stops a sampler that does not pack, or packs for a small model, and other completions."""
    model = loading.load_model(TINY, "fp32")
    dora.add_dora(model, 4, 8.0, 0.0, ALL)
    found = []
    for large in (speed.LARGE, 0):
        monkeypatch.setattr(speed, "LARGE", large)
        seen = []
        found.append(
            recode.sample(
                model, [[5, 6, 7], [8, 9]], num_samples=4, max_new_tokens=8, eos=[], seed=3,
                progress=lambda *_: seen.append(packed(model)),
            )
        )  # fmt: skip
        assert len(seen) == 8 and all(all(row) if large == 0 else not any(row) for row in seen)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- freed memory


@pytest.mark.parametrize("libc, expected", [("glibc", [-3, -1, -2]), ("musl", []), ("", [])])
def test_memory_is_kept_by_glibc_only(monkeypatch, libc, expected):
    """Stops an AttributeError, or a call of something else, where the C library is not glibc."""
    asked = []

    class Library:
        def mallopt(self, option, value):
            assert 0 < value < 2**31  # an int in C
            asked.append(option)
            return 1

    monkeypatch.setattr(speed.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(speed.platform, "libc_ver", lambda: (libc, ""))
    speed.keep_freed_memory()
    assert asked == expected


# ------------------------------------------------------------------------- adapters of strangers


@pytest.fixture
def adapter(half, tmp_path):
    """An adapter directory, and a function that changes what its two files hold."""
    dora.save_adapter(half, grpo.Config(r=4, alpha=8.0, targets=ALL), tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    weights = tmp_path / "adapter" / "adapter_model.safetensors"

    def change(changes, rename=None, without=None):
        if isinstance(changes, dict):
            changes = json.loads(settings.read_text()) | changes
        settings.write_text(json.dumps(changes))
        tensors = safetensors.torch.load_file(weights)
        if without:
            tensors = {name: x for name, x in tensors.items() if without not in name}
        if rename:
            tensors = {name.replace(*rename): x for name, x in tensors.items()}
        safetensors.torch.save_file(tensors, weights)
        return tmp_path / "adapter"

    return change


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ".*_proj", ["model.layers.0.self_attn.q_proj"], None],
    ids=["all-linear", "pattern", "full names", "absent"],
)
def test_target_modules_in_every_form(adapter, half, targets):
    """Stops an adapter of PEFT from being refused, or half loaded, for how it names its layers."""
    path = adapter({"target_modules": targets})
    loaded = loading.load_policy(TINY, path, "bf16")
    assert torch.equal(loaded(IDS).logits, half(IDS).logits)


def test_an_adapter_for_all_linear_layers_of_peft(tmp_path):
    """Stops an adapter that PEFT has made with all-linear from being refused or half loaded."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, "init_lora_weights": False}
    asked = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(loading.load_model(TINY, "fp32"), asked)
    theirs.save_pretrained(tmp_path)
    ours = loading.load_policy(TINY, tmp_path, "fp32")
    layers = dora.dora_layers(ours)
    assert len(layers) == 7 * ours.config.num_hidden_layers
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


GATE = "model.layers.1.mlp.gate_proj"
BAD_ADAPTERS = {
    "alpha": ({"lora_alpha": "x"}, None, None, "lora_alpha 'x': must be numbers above 0"),
    "alpha 0": ({"lora_alpha": 0}, None, None, "lora_alpha 0: must be numbers above 0"),
    "r 0": ({"r": 0}, None, None, "r 0, lora_alpha 8.0: must be numbers above 0"),
    "no r": ({"r": None}, None, None, "r None"),
    "r 1.5": ({"r": 1.5}, None, None, "r 1.5"),
    "another r": (
        {"r": 8},
        None,
        None,
        "does not fit the model: .*lora_A.weight is .4,.*must be .8,",
    ),
    "list": ([1, 2], None, None, "adapter_config.json: cannot be read as a JSON object"),
    "pairs": ([["r", 4]], None, None, "adapter_config.json: cannot be read as a JSON object"),
    "empty": ([], None, None, "adapter_config.json: cannot be read as a JSON object"),
    "kind": ({"peft_type": "IA3"}, None, None, "not a plain DoRA or LoRA adapter"),
    "rslora": ({"use_rslora": True}, None, None, "not a plain DoRA or LoRA adapter .*use_rslora"),
    "other names": ({}, ("gate_proj", "w1"), None, "no linear layer 'model.layers.0.mlp.w1'"),
    "other prefix": ({}, ("base_model.", "transformer."), None, "no linear layer 'transformer."),
    "missing": (
        {},
        None,
        GATE + ".lora_B",
        f"does not fit the model: .*{GATE}.lora_B.weight is None",
    ),
    "left over": ({"use_dora": False}, None, None, "lora_magnitude_vector is .*must be None"),
    "not adapted": ({}, ("lora_A", "lora_embedding_A"), None, "does not fit the model: "),
}


OTHER_KINDS = {
    "init_lora_weights": ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica"),
    "alora_invocation_tokens": ([5, 6],), "lora_bias": (True,), "bias": ("all", "lora_only"),
    "layer_replication": ([[0, 2]],), "fan_in_fan_out": (True,), "use_qalora": (True,),
    "megatron_config": ({"a": 1},), "trainable_token_indices": ([7],), "rank_pattern": ({"q": 2},),
    "target_parameters": (["mlp.experts"],), "kasa_config": ({"beta": 1},), "a new one": (0.5,),
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_KINDS)
def test_adapters_of_another_kind(adapter, key):
    """Stops an adapter that PEFT computes otherwise, or over a changed base, from being loaded."""
    for value in OTHER_KINDS[key]:
        with pytest.raises(BadInput, match=f"not a plain DoRA or LoRA adapter .*{key}.*; merge"):
            loading.load_policy(TINY, str(adapter({key: value})))


PEFT_WRITES = {  # PEFT 0.21.2 in a plain adapter, beside what save_adapter writes
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": ["lm_head"],
    "fan_in_fan_out": False, "init_lora_weights": "gaussian", "kasa_config": None,
    "layer_replication": None, "layers_pattern": "layers", "layers_to_transform": [0, 1],
    "loftq_config": {}, "lora_bias": False, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {}, "revision": None,
    "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip


@pytest.mark.parametrize("initial", [True, False, "gaussian", "orthogonal"])
def test_what_peft_writes_into_a_plain_adapter(adapter, half, initial):
    """Stops a check so strict that it refuses PEFT's own plain adapters."""
    written = adapter(PEFT_WRITES | {"init_lora_weights": initial})
    loaded = loading.load_policy(TINY, written, "bf16")
    assert torch.equal(loaded(IDS).logits, half(IDS).logits)


@pytest.mark.parametrize(
    "changes, rename, without, message", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS
)
def test_adapters_that_do_not_fit(
    adapter, changes, rename, without, message, tmp_path, monkeypatch, capsys
):
    """Stops a traceback, or an adapter that is loaded in part, for files that others have made."""
    path = adapter(changes, rename, without)
    with pytest.raises(BadInput, match=message) as error:
        loading.load_policy(TINY, str(path))
    (tmp_path / "config.json").write_text(json.dumps({"model": TINY}))
    (tmp_path / "old.py").write_text("x = 1\n")
    argv = [str(tmp_path / "old.py"), "--update", "x", "--library", "y", "--version", "1"]
    monkeypatch.setattr(sys, "argv", ["migrate.py", *argv, "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        parallel.run_main(migrate.main)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said[-1] == f"error: {error.value}"
