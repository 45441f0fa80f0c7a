"""Good inputs to damage: small checkpoints in every form, text files of every kind, a recipe."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from compressllm.core.masks import pack_bits, take_kept
from compressllm.core.run import Run
from compressllm.export.writer import export_model
from compressllm.models.bundle import open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.model import quantize_model

TINY = Path(__file__).parent.parent / "tests" / "tiny" / "model"
FOREIGN = "compressed-tensors"
TEXTS = [f"Line {number} of a text that is worth reading." for number in range(40)]
RECIPE = """\
model: demo
seed: 1
stages:
  - prune: &how {method: {wanda: {}}, pattern: 2:4, calibration: {source: builtin, samples: 8}}
  - export: {format: packed}
  - eval: {source: builtin, windows: 4}
"""


def make_inputs(folder: Path) -> dict[str, Path]:
    """Name -> a file, or a folder of a checkpoint, each good as it is."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, max_position_embeddings=32, **shape)
    torch.manual_seed(0)
    plain = folder / "plain"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, plain / name)
    pruned = _stage(folder / "pruned")
    prune_model(open_bundle(str(plain)), PruneConfig(method="magnitude", pattern="2:4"), Run(folder=pruned))
    inputs = {"plain": plain, "pruned": pruned / "model"}
    for name, format, shard in (("dense", "dense", 4000), ("packed", "packed", 1 << 30), ("shards", "packed", 2000)):
        export_model(Checkpoint(pruned / "model"), folder / name, format, max_shard_bytes=shard)
        inputs[name] = folder / name
    for scheme in ("int4-g32", "fp8"):
        work = _stage(folder / scheme)
        quantize_model(
            open_bundle(str(pruned / "model")), QuantizeConfig(method="rtn", scheme=scheme), Run(folder=work)
        )
        inputs[scheme] = work / "model"
    inputs[FOREIGN] = _foreign(Checkpoint(pruned / "model"), _stage(folder / FOREIGN))
    return inputs | _files(folder)


def _stage(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _foreign(source: Checkpoint, folder: Path) -> Path:
    """The same weights as llm-compressor stores them."""
    tensors: dict[str, torch.Tensor] = {}
    for name in source.specs:
        weight, keep = source.read(name), source.mask(name.removesuffix(".weight"))
        if keep is None:
            tensors[name] = weight
        else:
            tensors[f"{name}.compressed"] = take_kept(weight, keep)
            tensors[f"{name}.bitmask"] = pack_bits(keep)
            tensors[f"{name}.shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source.copy_side_files(folder)
    config = json.loads((folder / "config.json").read_text())
    described = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    return folder


def _files(folder: Path) -> dict[str, Path]:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    records = "".join(json.dumps({"instruction": text, "output": text}) + "\n" for text in TEXTS)
    contents = {
        "text.txt.gz": gzip.compress("\n".join(TEXTS).encode()),
        "rows.jsonl": rows.encode(),
        "rows.jsonl.gz": gzip.compress(rows.encode()),
        "records.jsonl.gz": gzip.compress(records.encode()),
        "recipe.yaml": RECIPE.encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    parquet.write_table(pa.table({"text": TEXTS}), folder / "rows.parquet")
    np.save(folder / "ids.npy", np.arange(64).reshape(4, 16))
    return {name: folder / name for name in (*contents, "rows.parquet", "ids.npy")}
