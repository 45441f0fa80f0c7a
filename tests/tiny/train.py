"""Train the tiny byte-level Llama that the tests prune, and write its two text files.

Run it from the repository root as ``python tests/tiny/train.py``; it takes about two minutes on one core. The model
learns from one half of the text that every CPython carries. The held-out file comes from the other half, of which
the model sees nothing; settings were chosen on the rest of that half, so that the file itself decided nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from compressllm.calibration.builtin import Builtin
from compressllm.core.protocols import Split

HERE = Path(__file__).parent
SEQLEN, BATCH, STEPS, PEAK_RATE, WARM_UP, SEED = 256, 8, 600, 5e-3, 40, 0
GAIN_RATE = 20
EXCERPT_BYTES = 60_000
END = "<|end|>"

CONFIG = LlamaConfig(
    vocab_size=257,  # the bytes and END
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=SEQLEN,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=256,
    dtype="float32",
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: id 0 to 255 is the byte's value, 256 is END. Adds no special token to a text."""
    shown = [chr(b) if chr(b).isprintable() and b not in (32, 173) else None for b in range(256)]
    others = iter(range(256, 512))  # as GPT-2: a byte without a sign of its own borrows one past 255
    alphabet = [sign or chr(next(others)) for sign in shown]
    tokenizer = Tokenizer(models.BPE(vocab={sign: id for id, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=SEQLEN
    )
    fast.add_special_tokens({"eos_token": END, "pad_token": END})
    return fast


def text_of(split: Split) -> str:
    """One part of the builtin text."""
    return "\n\n".join(Builtin().texts(split))


def excerpt(text: str) -> tuple[str, str]:
    """The first EXCERPT_BYTES of a text, cut at the end of a paragraph, and the rest."""
    end = text.encode()[:EXCERPT_BYTES].decode(errors="ignore").rindex("\n\n")
    return text[:end] + "\n", text[end:].lstrip("\n")


def train(ids: Tensor) -> LlamaForCausalLM:
    """A model trained on random windows of (n,) byte ids."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(CONFIG)
    # Norm gains learn faster than matrices, so that features come to differ in scale, as they do in large models. At
    # equal rates they stay within a few per cent of each other, and input norms tell Wanda next to nothing. For the
    # same reason no weight decays: decay alone makes unimportant weights small.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "speed": 1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "speed": GAIN_RATE},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    offsets = torch.arange(SEQLEN + 1)
    for step in range(STEPS):
        rate = PEAK_RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["speed"]
        windows = ids[torch.randint(len(ids) - SEQLEN, (BATCH, 1)) + offsets]
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {STEPS}: training loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Of (n,) ids in windows of SEQLEN end to end, the first byte of each not predicted."""
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    losses = []
    for batch in windows.split(32):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses.append(loss.mean(1))
    return math.exp(torch.cat(losses).mean())


def main() -> None:
    """Write ``model/``, ``calibration.txt``, ``eval.txt`` and ``training.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)  # the number of threads changes the order of sums, and so the last bits
    learned, held_out = text_of("calibration"), text_of("evaluation")
    ids = {
        name: torch.tensor(list(text.encode()))
        for name, text in {"learned": learned, "eval.txt": excerpt(held_out)[0], "rest": excerpt(held_out)[1]}.items()
    }

    begun = time.perf_counter()
    model = train(ids["learned"])
    facts = {
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - begun),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "learned_bytes": len(ids["learned"]),
        "learned_sha256": hashlib.sha256(learned.encode()).hexdigest(),
        "byte_perplexity": {name: round(perplexity(model, ids[name]), 4) for name in ("rest", "eval.txt")},
    }
    print(json.dumps(facts, indent=2))

    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.txt").write_text(excerpt(learned)[0], encoding="utf-8")
    (out / "eval.txt").write_text(excerpt(held_out)[0], encoding="utf-8")
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    model.save_pretrained(out / "model")
    byte_tokenizer().save_pretrained(out / "model")


if __name__ == "__main__":
    main()
