"""Refuses, at the start, a model that recode.py would compute otherwise than transformers does."""

import torch

import recode
from training.config import BadInput

FULL = "full_attention"  # transformers' name of a layer without a window


@torch.no_grad()
def check_policy(model, tokenizer, name):
    """Raise BadInput unless our log-probabilities are those of the model's own forward pass."""
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise BadInput(f"model: {name!r} has {words:,} words, its tokenizer {len(tokenizer):,}")
    kind = model.config.model_type
    windows = [each for each in getattr(model.config, "layer_types", None) or [] if each != FULL]
    if windows or getattr(model.config, "sliding_window", None):
        raise BadInput(f"model: {kind} with a sliding window is not supported")
    ids = torch.arange(5, 69, device=model.device)[None] % words  # (1, 64)
    tokens = ids[:, 32:]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    try:
        ours = recode.token_logps(model, [ids[0, :32].tolist()], tokens, mask)
    except RuntimeError:  # its layers do more than call the attention function
        raise BadInput(f"model: {kind} has an attention that cannot be replaced; not supported")
    logits = model(ids, use_cache=False).logits[:, 31:-1].float()
    theirs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    error = (ours - theirs).abs().mean().item()  # nats; bf16 kernels differ by up to 0.1
    if not error <= (0.3 if model.dtype == torch.bfloat16 else 0.01):
        raise BadInput(f"model: {kind} computes other logits, by {error:.2f}; not supported")


def check_context(model, prompts, config):
    """Refuse lengths beyond learned positions; warn where RoPE goes beyond its context."""
    longest = max(map(len, prompts)) + config.max_new_tokens
    context = getattr(model.config, "max_position_embeddings", None)
    if context and longest > context:
        text = f"up to {longest:,} tokens with the completion; the context is {context:,}"
        if not getattr(model.config, "rope_parameters", None):
            raise BadInput(f"--max-new-tokens: {text}")
        print(f"warning   {text}")
