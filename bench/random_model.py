"""A random model whose completions end, and tasks for it: python bench/random_model.py SPEC.

SPEC is JSON, the arguments of make(). A random model hardly ever emits EOS, and real completions
vary in length. Therefore one channel of the residual stream is a constant that no layer changes,
and EOS reads that channel alone: at every position its probability is about `end`, in any sampler.
Lengths are then geometric (1/110 with at most 256 tokens: 99 on average).

The tokenizer has one word per id. It decodes any ids to a well-formed answer with one name per
line, so the reward does all its work (parsing, edit distance) and the rewards of a group differ.
The model is a Llama, because transformers gives every Qwen2 the tokenizer of Qwen2.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, LlamaConfig

import data

PAD, EOS, UNKNOWN = 0, 1, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # name: vocabulary, hidden size, MLP size, layers, heads, KV heads
    "shrunk": (1000, 112, 224, 2, 28, 4),
    "5M": (2000, 256, 1024, 4, 4, 2),
    "25M": (6000, 512, 1536, 6, 8, 4),
    "0.5B": (151_936, 896, 4864, 24, 14, 2),  # Qwen2.5-Coder's, without biases; not tied
    "7B": (152_064, 3584, 18_944, 28, 28, 4),
}


def random_model(shape, end):
    """The random model of a shape on DEVICE, in fp32 on a CPU and in bf16 on a GPU."""
    vocab, width, mlp, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
        max_position_embeddings=32_768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.32 / width**0.5, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    set_eos_probability(model, end)
    return model


@torch.no_grad()
def set_eos_probability(model, end):
    """Set the probability of EOS to `end` everywhere (0: never), that of PAD and UNKNOWN to 0."""
    embedding = model.get_input_embeddings().weight  # (V, d)
    head = model.get_output_embeddings().weight  # (V, d)
    for layer in model.base_model.layers:  # no layer writes to channel 0
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    ids = torch.randint(3, len(head), (1, 128), device=head.device)
    constant = 1.0
    # as large as all other channels together, so that the final norm keeps it constant
    for _ in range(4):
        embedding[:, 0] = constant
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0].float()  # (128, d)
        constant = constant * (hidden[:, 1:].norm(dim=1) / hidden[:, 0]).mean().item()
    head[:, 0] = 0
    head[[PAD, EOS, UNKNOWN]] = 0
    head[[PAD, EOS, UNKNOWN], 0] = -100
    if end:
        logits = model.get_output_embeddings()(hidden.to(head.dtype)).float()  # (128, V)
        wanted = logits.logsumexp(-1) + torch.tensor(end / (1 - end)).log()
        head[EOS, 0] = (wanted / hidden[:, 0]).mean()


def make_tokenizer(vocab):
    """One word per id; decodes to a well-formed answer, one name per line."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"x{i}": i for i in range(UNKNOWN, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"x{UNKNOWN}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    before, after = data.TARGET.format(thought="", new_code="|").split("|")
    steps = [
        decoders.Replace("x", "\nx"),
        decoders.Fuse(),
        decoders.Replace(Regex(r"\A\n"), before),
        decoders.Replace(Regex(r"\z"), after),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_rows(tokenizer, vocab, longest):
    """64 rows of a data set whose prompts have `longest` tokens or up to a fifth less.

    The note is random words, the reference answer 100 names. All other words of a prompt are
    unknown to the tokenizer.
    """
    rng = random.Random(0)
    row = {"dependency": "lib", "new_version": "2.0", "description": "", "old_code": "x3"}
    own = len(data.encode_prompt(data.Example(**row, update_info="", new_code=""), tokenizer))
    rows = []
    for _ in range(64):
        note = rng.choices(range(3, vocab), k=rng.randint(longest * 4 // 5, longest) - own)
        answer = rng.choices(range(3, vocab), k=100)
        row["update_info"] = " ".join(f"x{i}" for i in note)
        row["new_code"] = "\n".join(f"x{i}" for i in answer)
        rows.append(dict(row))
    return rows


def make(directory, shape, end, longest, gpu):
    """Write a checkpoint, and data.jsonl with its tasks, to a directory."""
    if gpu and DEVICE == "cpu":
        sys.exit("error: --gpu: torch sees no GPU here; --shrink tries the code without one")
    model = random_model(shape, end)
    vocab = model.config.vocab_size
    tokenizer = make_tokenizer(vocab)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    rows = make_rows(tokenizer, vocab, longest)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(directory) / "data.jsonl").write_text(text)


if __name__ == "__main__":
    make(**json.loads(sys.argv[1]))
