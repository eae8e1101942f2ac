"""One side of bench.py's comparison, in a process of its own: python bench/sides.py SPEC.

SPEC is JSON, see Spec. Our modules come from PYTHONPATH, which may name another checkout. The
answer is one line of JSON on stdout.

    ours       the training loop of grpo.py
    trl        TRL's GRPOTrainer with the same model, prompts, reward and sizes, and PEFT's adapter
    gradients  the gradient of one update of ours, written to a file or compared with that file
"""

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

import data
import grpo
import lib.config
import recode
import reward
import training.setup
from lib import speed

WARM_UP = 1  # steps that do not count
STEPS = 2  # steps that count
CUDA = torch.cuda.is_available()


@dataclasses.dataclass
class Spec:
    side: str  # ours, trl or gradients
    flags: list = ()  # ours, gradients: of grpo.py
    cpu_time: bool = False  # measure CPU time, not wall time
    graphs: bool = True  # ours: decode with CUDA graphs
    config: dict = None  # trl: the settings of our side
    dtype: str = ""  # trl: the dtype of our side's weights
    checkpointing: bool = True  # trl: compute layers again in the backward pass, its default
    file: str = ""  # gradients: written if it does not exist


# ------------------------------------------------------------------------- time and memory


def clock(spec):
    """Seconds; on a GPU after all queued work is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.process_time() if spec.cpu_time else time.perf_counter()


def memory():
    """(now, peak) of this process in MiB: allocated on a GPU, or resident on a CPU (Linux only)."""
    if CUDA:
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    text = Path("/proc/self/status").read_text()
    fields = [text.split(f"{name}:")[1].split()[0] for name in ("VmRSS", "VmHWM")]
    return int(fields[0]) / 1024, int(fields[1]) / 1024


def forget_peak():
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def finish(steps, before, model):
    """A side's answer: the steps that count; the peak above `before` and the frozen weights."""
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return {"steps": steps[WARM_UP:], "peak": memory()[1] - before - frozen / 2**20}


# ------------------------------------------------------------------------- our side


def no_graph(*_):
    """In place of speed.capture_and_check: a capture that failed, so decoding stays eager."""
    return None, None


def set_up(flags):
    """What main() in grpo.py begins with: (config, model, tokenizer, tasks, optimizer)."""
    with tempfile.TemporaryDirectory() as output:  # a run directory, never used
        config = lib.config.parse_config(grpo.Config, [*flags, "--output", output], grpo.__doc__)
        _, model, tokenizer, tasks, _ = training.setup.set_up(config)
    return config, model, tokenizer, tasks, training.setup.make_optimizer(model, config)


def ours(spec):
    before, _ = memory()
    if not spec.graphs:
        speed.capture_and_check = no_graph
    config, model, tokenizer, tasks, optimizer = set_up(spec.flags)
    forget_peak()
    steps = []
    position = 0
    for _ in range(WARM_UP + STEPS):
        started = clock(spec)
        batch, _, _, position = grpo.collect(model, tokenizer, tasks, position, config)
        sampled = clock(spec)
        grpo.update(model, optimizer, batch, config)
        ended = clock(spec)
        lengths = batch.mask.sum(1).tolist()
        steps.append({"rollout": sampled - started, "update": ended - sampled, "lengths": lengths})
    settings = {"config": dataclasses.asdict(config), "dtype": str(model.dtype).split(".")[1]}
    return finish(steps, before, model) | settings


# ------------------------------------------------------------------------- TRL's side


def make_rows(tokenizer, config):
    """A data set for TRL: the tasks of our side in its order, prompts as text."""
    examples = data.load_examples(config["data"])
    tasks = data.encode_tasks(examples, tokenizer, config["max_prompt_tokens"])
    rows = []
    count = config["prompts_per_step"] * (WARM_UP + STEPS)
    for prompt, example in data.draw(tasks, 0, count, config["seed"]):
        text = tokenizer.decode(prompt)
        if tokenizer.encode(text) != prompt:  # the tokenizer of random_model.py
            text = " ".join(tokenizer.convert_ids_to_tokens(prompt))
        assert tokenizer.encode(text) == prompt, "TRL would see another prompt"
        rows.append({"prompt": text, "target": example.new_code})
    return rows


def check_untouched(model):
    """Fail if our code has changed how TRL's model computes: its RMSNorm, or the attention."""
    assert torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN's attention is off"
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms, "the model has no RMSNorm"
    for norm in norms:
        own = type(norm).forward.__module__ == type(norm).__module__
        assert own and "forward" not in vars(norm), "the model's RMSNorm was replaced"


class Watch(TrainerCallback):
    """Measures GRPOTrainer's steps; rollout is sampling and scoring, update is everything else."""

    def __init__(self, spec):
        self.spec = spec
        self.steps = []

    def on_step_begin(self, *_, **__):
        self.steps.append({"rollout": 0.0, "lengths": []})
        self.started = clock(self.spec)

    def on_step_end(self, *_, **__):
        step = self.steps[-1]
        step["update"] = clock(self.spec) - self.started - step["rollout"]

    def time(self, trainer, name):
        """Add the time of a method of the trainer to the rollout."""
        method = getattr(trainer, name)

        def timed(*args, **kwargs):
            started = clock(self.spec)
            result = method(*args, **kwargs)
            self.steps[-1]["rollout"] += clock(self.spec) - started
            if name == "_generate_single_turn":
                self.steps[-1]["lengths"] += map(len, result[0])
            return result

        setattr(trainer, name, timed)


def score(completions, target, **_):
    return [reward.score(text, code) for text, code in zip(completions, target, strict=True)]


def trl_settings(spec):
    """GRPOConfig's settings that are not its defaults: what the comparison needs."""
    ours = spec.config
    rows = ours["prompts_per_step"] * ours["num_samples"]
    size = min(8, rows)  # 8 is TRL's default
    return {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size,
        "num_generations": ours["num_samples"], "max_completion_length": ours["max_new_tokens"],
        "beta": ours["beta"], "learning_rate": ours["lr"], "temperature": ours["temperature"],
        "loss_type": "grpo", "max_steps": WARM_UP + STEPS, "seed": ours["seed"],
        "shuffle_dataset": False, "gradient_checkpointing": spec.checkpointing,
        "use_cpu": not CUDA, "bf16": spec.dtype == "bfloat16", "disable_tqdm": True,
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip


def trl(spec):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    before, _ = memory()
    ours = spec.config
    tokenizer = AutoTokenizer.from_pretrained(ours["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(ours["model"], dtype=spec.dtype)
    rows = Dataset.from_list(make_rows(tokenizer, ours))
    adapter = LoraConfig(
        r=ours["r"], lora_alpha=ours["alpha"], target_modules=ours["targets"].split(","),
        use_dora=ours["adapter"] == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip
    watch = Watch(spec)
    more = {"processing_class": tokenizer, "peft_config": adapter, "callbacks": [watch]}
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(output, **trl_settings(spec))
        trainer = GRPOTrainer(model, score, config, rows, **more)
        check_untouched(trainer.model)
        watch.time(trainer, "_generate_single_turn")
        watch.time(trainer, "_calculate_rewards")
        forget_peak()
        trainer.train()
    return finish(watch.steps, before, trainer.model)


# ------------------------------------------------------------------------- gradients


def gradients(spec):
    """Write our gradient to spec.file; where the file exists, how far ours is from it.

    The file also holds the adapter, moved away from where it starts (there B is 0, and so is the
    gradient of A), and what was sampled. Both sides compute the rest, rewards included.
    """
    config, model, tokenizer, tasks, optimizer = set_up(spec.flags)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    path = Path(spec.file)
    known = torch.load(path) if path.exists() else {}
    found = {"adapter": known.get("adapter", {}), "sample": known.get("sample")}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in trained.items():
            if not known:
                found["adapter"][name] = p + 0.003 * torch.randn(p.shape).to(p)
            p.copy_(found["adapter"][name])
    sample = recode.sample

    def sample_once(*args, **settings):
        found["sample"] = found["sample"] or sample(*args, **settings)
        return found["sample"]

    def keep_gradients():
        found["gradients"] = {name: p.grad.float() for name, p in trained.items()}

    recode.sample = sample_once
    optimizer.step = keep_gradients
    batch = grpo.collect(model, tokenizer, tasks, 0, config)[0]
    grpo.update(model, optimizer, batch, config)
    if known:
        return difference(known["gradients"], found["gradients"])
    torch.save(found, path)
    return {}


def difference(old, new):
    """The relative error of a gradient {name: tensor}: of all of it, and of the worst tensor."""
    errors = {name: (new[name] - g).norm().item() for name, g in old.items()}
    sizes = {name: g.norm().item() for name, g in old.items()}
    worst = max(old, key=lambda name: errors[name] / sizes[name])
    error = math.hypot(*errors.values()) / math.hypot(*sizes.values())
    return {"error": error, "worst": errors[worst] / sizes[worst], "name": worst}


def main():
    spec = Spec(**json.loads(sys.argv[1]))
    with contextlib.redirect_stdout(sys.stderr):  # only the answer goes to stdout
        answer = {"ours": ours, "trl": trl, "gradients": gradients}[spec.side](spec)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
