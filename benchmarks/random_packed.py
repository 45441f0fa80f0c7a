"""Write a packed 2:4 checkpoint of a real model's shape with random weights: for speed and memory, not for text.

    python benchmarks/random_packed.py FOLDER --shape llama-3.2-1b

The output head is pruned as well unless --tied is given; then it is the embedding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from shapes import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

from compressllm import __version__
from compressllm.core.pattern import NM
from compressllm.core.protocols import FORMATS
from compressllm.core.registry import build
from compressllm.models.blocks import all_linears
from compressllm.models.facts import Facts, LinearFacts
from compressllm.models.shards import ShardWriter
from compressllm.models.tensorfile import TensorSpec

PATTERN = NM(2, 4)


def make_packed(folder: Path, shape: str, tied: bool) -> int:
    """Write the checkpoint, tensor by tensor; the bytes of its weight files."""
    settings = SHAPES[shape] | {"tie_word_embeddings": tied}
    config = LlamaConfig(**settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    linears = {name: linear.shape for name, linear in all_linears(model).items()}
    if not tied:
        linears["lm_head"] = tuple(model.lm_head.weight.shape)
    packed = build(FORMATS, "packed")
    layout = {}
    for name, p in model.named_parameters():
        owner = name.removesuffix(".weight")
        if owner in linears:  # every row keeps half, so any such mask gives the shapes
            keep = torch.tensor([True, True, False, False]).expand(p.shape[0], -1).repeat(1, p.shape[1] // 4)
            layout |= {part: TensorSpec(*spec) for part, spec in packed.layout(owner, torch.bfloat16, keep).items()}
        elif name not in model.all_tied_weights_keys:
            layout[name] = TensorSpec(torch.bfloat16, tuple(p.shape))
    folder.mkdir(parents=True)
    facts = Facts(
        written_by=__version__,
        format="packed",
        variant="packed",
        linears={name: LinearFacts(pattern=PATTERN, shape=shape) for name, shape in linears.items()},
    )
    facts.write(folder)
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "compressllm", "format": "packed", "version": 1}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    writer = ShardWriter(folder, layout, "packed")
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        owner = name.removesuffix(".weight")
        if owner in linears:
            weight = torch.empty(p.shape).normal_(std=0.02, generator=generator)
            keep = PATTERN.keep(weight.abs())
            for part, tensor in packed.pack(owner, weight.bfloat16(), keep):
                writer.write(part, tensor)
        elif name in layout:
            values = torch.empty(p.shape, dtype=torch.bfloat16)
            writer.write(name, values.fill_(1) if p.dim() == 1 else values.normal_(std=0.02, generator=generator))
    writer.finish()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--tied", action="store_true", help="the output head is the embedding, dense")
    options = parser.parse_args()
    print(f"{make_packed(options.folder, options.shape, options.tied) / 1e9:.2f} GB in {options.folder}")


if __name__ == "__main__":
    main()
