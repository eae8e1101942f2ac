"""TRL's side of bench.py's whole step, in a process of its own: python bench/bench_trl.py SPEC.

SPEC and the protocol are those of bench_work.py: a line on stdin starts one optimizer step, and the
answer says where its time went. GRPOTrainer is at its defaults, with the same model, prompts,
reward and adapter (PEFT's). Only what the comparison needs is set: the sizes of the workload,
loss_type="grpo" (the paper's), fp32 on the CPU, no saving, no reporting.
"""

import json
import sys
import tempfile
import warnings
from collections import Counter

import torch
from bench_work import Spec, clock_of, memory_of, workload
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

import reward


class OneStepAtATime(TrainerCallback):
    """Starts one step per line on stdin, and prints its measurements when it is over."""

    def __init__(self, spec, spent, before):
        self.spec, self.spent, self.before = spec, spent, before
        self.clock = clock_of(spec.device, spec.checkpoint)
        self.answers, sys.stdout = sys.stdout, sys.stderr  # only answers go to stdout

    def on_step_begin(self, *_, **__):
        if not sys.stdin.readline():
            sys.exit(0)
        self.spent.clear()
        self.started = self.clock()

    def on_step_end(self, *_, **__):
        seconds = self.clock() - self.started
        accounted = sum(self.spent[name] for name in ("rollout", "reference"))
        answer = dict(self.spent) | {"seconds": seconds, "update": seconds - accounted}
        answer |= {
            "reference": self.spent["reference"],
            "peak": memory_of(self.spec.device)[1] - self.before,
        }
        print(json.dumps(answer), file=self.answers, flush=True)


def watch(trainer, spent, clock):
    """Add to `spent` the seconds of rollout (sampling, scoring) and reference, and the tokens."""

    def timed(method, name, applies=lambda: True):
        original = getattr(trainer, method)

        def run(*args, **kwargs):
            started, counted = clock(), applies()
            result = original(*args, **kwargs)
            spent[name] += (clock() - started) * counted
            if method == "_generate_single_turn":
                spent["tokens"] += sum(map(len, result[0]))
                spent["completions"] += len(result[0])
            return result

        setattr(trainer, method, run)

    timed("_generate_single_turn", "rollout")
    timed("_calculate_rewards", "rollout")
    timed("_get_per_token_logps_and_entropies", "reference", lambda: not torch.is_grad_enabled())


def score(completions, target, **_):
    return [reward.score(text, code) for text, code in zip(completions, target, strict=True)]


def main():
    spec, spent = Spec(**json.loads(sys.argv[1])), Counter()
    warnings.simplefilter("ignore")
    model, tokenizer, tasks = workload(spec)
    logging.set_verbosity_error()
    rows = []
    for prompt, example in tasks:
        text = tokenizer.decode(prompt) if spec.checkpoint else " ".join(f"x{i}" for i in prompt)
        rows.append({"prompt": text, "target": example.new_code})
    before = memory_of(spec.device)[0]
    size = min(8, spec.prompts * spec.num_samples)  # 8 is TRL's default
    accumulation = spec.prompts * spec.num_samples // size
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            num_generations=spec.num_samples, max_completion_length=spec.new_tokens, beta=spec.beta,
            loss_type="grpo",
            gradient_checkpointing=spec.checkpointing, bf16=model.dtype == torch.bfloat16,
            use_cpu=spec.device == "cpu",
            max_steps=10_000, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        adapter = LoraConfig(
            r=64,
            lora_alpha=64,
            target_modules=["q_proj", "v_proj"],
            use_dora=spec.adapter == "dora",
            task_type="CAUSAL_LM",
        )
        trainer = GRPOTrainer(
            model, score, config, Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[OneStepAtATime(spec, spent, before)],
        )  # fmt: skip
        watch(trainer, spent, clock_of(spec.device, spec.checkpoint))
        trainer.train()


if __name__ == "__main__":
    main()
