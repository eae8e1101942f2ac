"""Evaluation: does the model follow the update it is shown, and does it still know the rest?

    python eval.py                                              embedded model, held-out tasks
    python eval.py --model runs/grpo --output runs/eval-grpo    the same after training
    python eval.py --compare runs/eval runs/eval-grpo           the change
    python eval.py --task humaneval --data HumanEval.jsonl.gz --references    check the sandbox
    python eval.py --task numpy2 --model Qwen/Qwen2.5-Coder-0.5B-Instruct     programs that are run
    torchrun --nproc-per-node 8 eval.py --task codeupdatearena --model ...    on 8 GPUs

tasks/ says what is asked and when an answer is right. Each task has a directory in --output, with
config.json, samples.jsonl (completions and verdicts), table.json and table.md. After a kill, the
same command continues. Metrics are means with 95 % intervals; --compare pairs runs by problem.

    pass@k           the share of problems that one of k samples solves, see tasks/table.py
    UPass@k          the same, where right means: passes with the update and fails without it
    pass_if_formed   the share that is right of the answers in the right format
    reward, es_star, em_star, stale, obeys  of migrations, see reward.py; reward = format + es_star
    determined       exact match where note and old code hold every word of the reference
    unchanged        exact match where the note asks for no change
    stray_lines      changed lines that the reference keeps, mean per answer, see tasks/migration.py
"""

import contextlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rollout
import tasks
from lib import loading, parallel
from lib.config import CHOICES, TINY, BadInput, Parser, open_policy
from lib.files import write
from tasks import judging, table
from tasks.table import pass_at_k  # noqa: F401, others call eval.pass_at_k
from training import screen, setup
from training.run import append


def complete(model, tokenizer, batch, args):
    """Sample a batch of (problem, prompt, seed): a row (dict) for each completion."""
    problems, prompts, seeds = zip(*batch)
    n = args.num_samples
    answers = rollout.sample_answers(
        model, tokenizer, prompts, n, args.max_new_tokens, args.temperature, seeds, args.top_p
    )
    rows = []
    for i, answer in enumerate(answers):
        row = {"problem": problems[i // n].name, "sample": i % n, "completion": answer.text}
        rows.append(row | {"tokens": len(answer.ids), "cut": answer.cut})
    return rows


def sample_and_judge(problems, directory, box, args):
    """Sample and judge what the log lacks; a batch is judged while the next one is sampled."""
    path = directory / (f"samples-{parallel.RANK}.jsonl" if parallel.RANK else "samples.jsonl")
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill may cut the last row short
    log = judging.read_log(directory)
    tokenizer = loading.load_tokenizer(args.model)
    model = None
    seed = args.seed * 1_000_003  # a problem has its own, whichever rank samples it
    work = [(p, p.encode(tokenizer), seed + i) for i, p in enumerate(problems)]
    work.sort(key=lambda item: -len(item[1]))  # longest prompt first: too long shows at once
    batches = [work[i : i + args.batch] for i in range(0, len(work), args.batch)]
    by_name = {problem.name: problem for problem in problems}
    jobs = []
    passed = []

    def judge(row):
        return row | by_name[row["problem"]].judge(row["completion"], box)

    pool = ThreadPoolExecutor(judging.JUDGES)
    try:
        mine = [*parallel.share(batches), []]  # the last one is empty: only verdicts are left
        for batch in screen.progress(mine, args.task, parallel.RANK > 0, passed):
            keys = {(problem.name, j) for problem, *_ in batch for j in range(args.num_samples)}
            rows = []
            if not keys <= log.keys():
                if model is None:
                    model = loading.load_policy(args.model, args.adapter, args.dtype)
                    setup.check_policy(model, tokenizer, args.model)
                    setup.check_context(model, [prompt for _, prompt, _ in work], args)
                rows = complete(model, tokenizer, batch, args)
            done = [job.result() for job in jobs]  # raises what a judge raised
            append(path, done, "give the same command again")
            passed += [row["passed"] for row in done]
            missing = [row for row in rows if (row["problem"], row["sample"]) not in log]
            jobs = [pool.submit(judge, row) for row in missing]
    finally:
        pool.shutdown(cancel_futures=True)


def parse(argv):
    """The checked arguments."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--model", default=TINY, metavar="X", help="run or checkpoint directory, or hub id [tiny]")
    add("--adapter", default="", metavar="X", help="adapter directory [the run's, else none]")
    add("--task", default="migration", choices=list(tasks.TASKS), help="benchmark [migration]")
    add("--data", default="", metavar="X", help="JSONL file or hub id [the task's or model's]")
    add("--output", default="runs/eval", metavar="X", help="directory of the results [runs/eval]")
    add("--no-update", action="store_true", help="leave the update notes out [off]")
    add("--prompt", default="recode", choices=["recode", "plain"], help="of HumanEval [recode]")
    add = parser.add_argument_group("samples").add_argument
    add("--num-samples", default=5, type=int, metavar="X", help="completions per problem [5]")
    add("--temperature", default=0.8, type=float, metavar="X", help="0 is greedy [0.8]")
    add("--top-p", default=0.7, type=float, metavar="X", help="nucleus sampling [0.7]")
    add("--k", type=int, nargs="+", metavar="X", help="k of pass@k [1, and 5 of 5 or more samples]")
    add("--max-new-tokens", type=int, metavar="X", help="cut longer ones [the model's, else 1024]")
    add("--batch", default=8, type=int, metavar="X", help="prompts sampled at once [8]")
    add("--seed", default=42, type=int, metavar="X", help="of the samples [42]")
    add("--dtype", default="auto", choices=CHOICES["dtype"], help="of frozen weights [auto]")
    add("--unsafe", action="store_true", help="run answers even without a sandbox [off]")
    add = parser.add_argument_group("other modes").add_argument
    add("--references", action="store_true", help="judge the reference solutions [off]")
    add("--compare", nargs="+", metavar="RUN", help="compare finished evaluations [none]")
    args = parser.parse_args(argv)
    if args.k is None:
        args.k = [k for k in (1, 5) if k <= args.num_samples]
    if not args.compare:
        resolve(args)
        check_args(args)
    return args


def resolve(args):
    """Replace a run directory by its model and adapter; set what was not given."""
    args.model, adapter, settings = open_policy(args.model)
    loading.check_name(args.model)
    if not args.adapter:
        args.adapter = adapter
    if args.max_new_tokens is None:
        args.max_new_tokens = settings.get("max_new_tokens", 1024)
    heldout = settings.get("heldout", "")  # may be a share
    if args.task == "migration" and not args.data and Path(heldout).is_file():
        args.data = heldout
    if not args.data:
        args.data = tasks.SOURCES.get(args.task, "")


def check_args(args):
    """Raise BadInput, naming the flag, where the arguments make no sense."""
    for name in ("num_samples", "max_new_tokens", "batch"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    sampling = 0 <= args.temperature < math.inf and 0 < args.top_p <= 1
    if not sampling or not 0 <= args.seed < 2**32:
        raise BadInput("--temperature must be at least 0, --top-p in (0, 1], --seed in [0, 2**32)")
    for k in args.k:
        if not 1 <= k <= args.num_samples:
            raise BadInput(f"--k {k}: pass@k needs 1 <= k <= --num-samples {args.num_samples}")
    human = args.task.startswith("humaneval")
    if args.no_update and human:
        raise BadInput(f"--no-update: {args.task} has no update notes")
    if args.prompt == "plain" and not human:
        raise BadInput(f"--prompt plain: only for humaneval and humaneval+, not for {args.task}")
    if args.references and args.task == "migration":
        raise BadInput("--references: a migration has no tests to run; give another --task")
    if not args.data and human:
        raise BadInput("--data: give HumanEval.jsonl.gz of openai/human-eval")
    if not args.data:
        raise BadInput(f"--data: give a JSONL file; {args.model} brings no held-out file")


def main(argv=None):
    """Evaluate, check the references, or compare. Returns 0, or 1 where references fail."""
    args = parse(argv)
    if args.compare:
        print(table.compare(args.compare), end="")
        return 0
    plain = args.prompt == "plain"
    problems = tasks.load(args.task, args.data, args.no_update, plain)
    directory = Path(args.output) / (f"{args.task}-plain" if plain else args.task)
    box = contextlib.nullcontext()
    if args.task != "migration":
        box = judging.open_sandbox(problems, args.unsafe)
    with box:
        if args.references:
            return judging.references(problems, box)
        parallel.start()
        judging.claim(directory, args)
        size = f"{len(problems):,} problems of {args.data}, {args.num_samples} samples each"
        print(f"{args.task}: {size}", flush=True)
        sample_and_judge(problems, directory, box, args)
    parallel.barrier()
    if parallel.RANK == 0:
        result = table.tabulate(problems, judging.read_log(directory), args)
        write(directory / "table.json", json.dumps(result, indent=1).encode())
        text = table.show(result)
        write(directory / "table.md", text.encode())
        print(text)
        print(f"done: {directory}/ holds samples.jsonl, table.md and table.json")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
