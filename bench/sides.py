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


def status(field):
    """Resident memory of this process (VmRSS) or its peak (VmHWM), in MiB. Linux only."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def frozen_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


class Memory:
    """The peak above libraries and frozen weights. Make it before the model is loaded."""

    def __init__(self):
        self.libraries = 0 if CUDA else status("VmRSS")

    def reset(self):
        """Forget the peak of loading."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self, model):
        """MiB since reset()."""
        highest = torch.cuda.max_memory_allocated() / 2**20 if CUDA else status("VmHWM")
        return highest - self.libraries - frozen_bytes(model) / 2**20


def seconds_to_read(model, spec):
    """Seconds to read the frozen weights once, at the bandwidth of a large copy, the best of ten.

    A decoding step reads all of them but an input embedding that is not tied to the output layer.
    """
    size = frozen_bytes(model)
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedding:
        size -= embedding.numel() * embedding.element_size()
    source = torch.ones(2**28, dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        started = clock(spec)
        target.copy_(source)
        times.append(clock(spec) - started)
    return size * min(times) / (2 * 2**28)  # a copy reads and writes


# ------------------------------------------------------------------------- our side


def no_graph(*_):
    """In place of speed.capture_and_check: a capture that failed, so decoding stays eager."""
    return None, None


def set_up(flags):
    """What main() in grpo.py begins with: (config, model, tokenizer, tasks, optimizer)."""
    config = lib.config.parse_config(grpo.Config, flags, grpo.__doc__)
    _, model, tokenizer, tasks, _ = training.setup.set_up(config)
    return config, model, tokenizer, tasks, training.setup.make_optimizer(model, config)


def ours(spec):
    memory = Memory()
    if not spec.graphs:
        speed.capture_and_check = no_graph
    config, model, tokenizer, tasks, optimizer = set_up(spec.flags)
    memory.reset()
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
    answer = {"steps": steps[WARM_UP:], "peak": memory.peak(model)}
    answer |= {"config": dataclasses.asdict(config), "dtype": str(model.dtype).split(".")[1]}
    return answer | {"reading": seconds_to_read(model, spec)}


# ------------------------------------------------------------------------- TRL's side


def prompt_text(prompt, tokenizer):
    """A text that the tokenizer encodes as `prompt`, a list of ids."""
    for text in (
        tokenizer.decode(prompt),
        " ".join(tokenizer.convert_ids_to_tokens(prompt)),  # random_model.py's decodes otherwise
    ):
        if tokenizer(text)["input_ids"] == prompt:
            return text
    raise AssertionError("the prompt cannot be given to TRL as text")


def make_rows(tokenizer, config):
    """A data set for TRL: the tasks of our side, in its order."""
    examples = data.load_examples(config["data"])
    tasks = data.encode_tasks(examples, tokenizer, config["max_prompt_tokens"], {})
    drawn = data.draw(tasks, 0, config["prompts_per_step"] * (WARM_UP + STEPS), config["seed"])
    rows = []
    for prompt, example in drawn:
        rows.append({"prompt": prompt_text(prompt, tokenizer), "target": example.new_code})
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
    same = {"num_generations": ours["num_samples"], "beta": ours["beta"], "seed": ours["seed"]}
    same |= {"max_completion_length": ours["max_new_tokens"], "temperature": ours["temperature"]}
    same |= {"max_steps": WARM_UP + STEPS, "learning_rate": ours["lr"], "loss_type": "grpo"}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size}
    where = {"use_cpu": not CUDA, "bf16": spec.dtype == "bfloat16", "shuffle_dataset": False}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    quiet["disable_tqdm"] = True
    return same | sizes | where | quiet | {"gradient_checkpointing": spec.checkpointing}


def trl(spec):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    memory = Memory()
    ours = spec.config
    tokenizer = AutoTokenizer.from_pretrained(ours["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(ours["model"], dtype=spec.dtype)
    rows = Dataset.from_list(make_rows(tokenizer, ours))
    adapter = LoraConfig(
        r=ours["r"], lora_alpha=ours["alpha"], target_modules=ours["targets"].split(","),
        use_dora=ours["adapter"] == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip
    watch = Watch(spec)
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(output, **trl_settings(spec))
        trainer = GRPOTrainer(
            model, score, config, rows, processing_class=tokenizer, peft_config=adapter,
            callbacks=[watch],
        )  # fmt: skip
        check_untouched(trainer.model)
        watch.time(trainer, "_generate_single_turn")
        watch.time(trainer, "_calculate_rewards")
        memory.reset()
        trainer.train()
    return {"steps": watch.steps[WARM_UP:], "peak": memory.peak(trainer.model)}


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
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(known["adapter"][name] if known else p + 0.003 * torch.randn(p.shape).to(p))
    sample = recode.sample
    found = {"adapter": {name: p.detach().clone() for name, p in trained.items()}}

    def replay(*args):
        found["sample"] = known["sample"] if known else sample(*args)
        return found["sample"]

    def keep():
        found["gradients"] = {name: p.grad.float().cpu() for name, p in trained.items()}

    recode.sample = replay
    optimizer.step = keep
    batch = grpo.collect(model, tokenizer, tasks, 0, config)[0]
    grpo.update(model, optimizer, batch, config)
    if not known:
        torch.save(found, path)
    return difference(known["gradients"], found["gradients"]) if known else {}


def difference(old, new):
    """The relative error of a gradient {name: tensor}: of all of it, and of the worst tensor."""
    errors = {name: (new[name] - g).norm().item() for name, g in old.items()}
    sizes = {name: g.norm().item() for name, g in old.items()}
    worst = max(old, key=lambda name: errors[name] / sizes[name])
    whole = sum(e**2 for e in errors.values()) / sum(size**2 for size in sizes.values())
    return {"error": whole**0.5, "worst": errors[worst] / sizes[worst], "name": worst}


def main():
    spec = Spec(**json.loads(sys.argv[1]))
    with contextlib.redirect_stdout(sys.stderr):  # only the answer goes to stdout
        answer = {"ours": ours, "trl": trl, "gradients": gradients}[spec.side](spec)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
