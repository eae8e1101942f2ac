"""GRPO in one file, to read before grpo.py: no adapter, no machinery, nothing done for speed.

    python naive_grpo.py

This trains all weights of the toy in tiny/: a minute on a CPU, mean reward from 1.9 to 2.9. Every
prompt gets a group of completions, reward.py scores them, and those better than their group's mean
become more likely. For completion i of N, with |o_i| tokens (EOS included), and its token t:

    R_i    = format + correctness, between -3 and 3                               (eq. 2)
    A_i    = (R_i - mean(R)) / (std(R) + 1e-4)      advantage within the group    (eq. 3)
    rho_it = exp(logp_it - old_it)                  ratio: now / when sampled     (eq. 4)
    S_it   = min(rho A, clip(rho, 1 - 0.2, 1 + 0.2) A)                            (eq. 5)
    k3_it  = exp(ref - logp) - (ref - logp) - 1     KL to the starting model      (eq. 6)
    J_it   = S_it - beta k3_it,  beta = 0.001                                     (eq. 7)
    w_it   = mask_it / |o_i| / N                    mean over tokens, then rows   (eq. 8)
    loss   = - sum w_it J_it                                                      (eq. 9)

The numbers are those of grpo.py; tests/test_naive.py holds both to the same loss and gradient.
Shapes: B = N = P * G rows; L and T tokens in the longest prompt and completion; V token ids.
"""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import reward

TINY = Path(__file__).parent / "tiny"
P = 8  # prompts per step
G = 8  # completions per prompt, a group
STEPS = 40
LR = 1e-4
CLIP = 0.2  # eq. 5
BETA = 0.001  # eq. 7


def generate(model, tokenizer, prompts):
    """G completions of each prompt: ids (B, L + T); which of them are no padding; mask (B, T)."""
    left = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")  # (P, L)
    # top_k=0, because transformers keeps the 50 likeliest tokens by default; log_probs scores all.
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": G, "max_new_tokens": 64}
    ids = model.generate(**left, **how)  # (B, L + T)
    is_eos = ids[:, left.input_ids.shape[1] :] == tokenizer.eos_token_id  # (B, T)
    mask = is_eos.cumsum(1) - is_eos.int() == 0  # (B, T), the first EOS counts: it is learned too
    visible = torch.cat([left.attention_mask.repeat_interleave(G, 0), mask], 1)  # (B, L + T)
    return ids, visible, mask


def advantages(R):
    """How much better each completion is than its group, in standard deviations, (P, G)."""
    mean = R.mean(1, keepdim=True).clamp(R.amin(1, keepdim=True), R.amax(1, keepdim=True))  # (P, 1)
    return (R - mean) / (R.std(1, keepdim=True) + 1e-4)  # eq. 3, (P, G); the clamp undoes rounding


def log_probs(model, ids, visible, T):
    """log pi(token | all tokens before it), (B, T), of the last T tokens."""
    logits = model(ids, attention_mask=visible).logits  # (B, L + T, V)
    logps = logits[:, -T - 1 : -1].log_softmax(-1)  # (B, T, V), column t - 1 predicts token t
    return logps.gather(-1, ids[:, -T:, None])[:, :, 0]  # (B, T)


def loss(logps, old_logps, ref_logps, A, mask):
    """The scalar to minimise. Log-probabilities and mask (B, T), advantages A (B,)."""
    A = A[:, None]  # (B, 1)
    ratio = torch.exp(logps - old_logps)  # eq. 4, (B, T)
    surrogate = torch.min(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)  # eq. 5, (B, T)
    k3 = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1  # eq. 6, (B, T)
    objective = surrogate - BETA * k3  # eq. 7, (B, T)
    weights = mask / mask.sum(1, keepdim=True) / len(mask)  # eq. 8, (B, T), their sum is 1
    return -(weights * objective).sum()  # eq. 9


def main():
    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    reference = copy.deepcopy(model)  # never trained
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    tasks = [data.Example(**json.loads(row)) for row in open(TINY / "train.jsonl")]
    for step in range(STEPS):
        examples = tasks[step * P : (step + 1) * P]
        prompts = [data.encode_prompt(example, tokenizer) for example in examples]
        ids, visible, mask = generate(model, tokenizer, prompts)  # (B, L + T) twice, (B, T)
        T = mask.shape[1]
        texts = tokenizer.batch_decode(ids[:, -T:], skip_special_tokens=True)
        targets = [example.new_code for example in examples for _ in range(G)]
        rewards = torch.tensor(list(map(reward.score, texts, targets))).view(P, G)  # eq. 2
        logps = log_probs(model, ids, visible, T)  # (B, T)
        with torch.no_grad():
            ref_logps = log_probs(reference, ids, visible, T)  # (B, T)
        # The model has not changed since it sampled, so the old log-probabilities are these and
        # the ratio is 1. The loss is then about 0; its gradient is not.
        value = loss(logps, logps.detach(), ref_logps, advantages(rewards).flatten(), mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        print(f"step {step + 1:2}   reward {rewards.mean():6.3f}   loss {value.item():8.5f}")


if __name__ == "__main__":
    main()
