"""Cut a checkpoint to its first blocks, in float32, so that two codes can be compared in seconds.

python benchmarks/cut_blocks.py --model demo --blocks 2 --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import open_bundle


def main() -> None:
    """Write the cut checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    bundle = open_bundle(options.model)
    if bundle.checkpoint is None:
        raise SystemExit("the model has no folder")
    source, prefix = bundle.checkpoint, find_blocks(bundle.model).prefix
    options.out.mkdir(parents=True)
    tensors = {}
    for name in source.specs:
        inside = name.startswith(f"{prefix}.")
        if not inside or int(name.removeprefix(f"{prefix}.").split(".")[0]) < options.blocks:
            tensors[name] = source.read(name).float()
    save_file(tensors, options.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source.folder / "config.json").read_text())
    config |= {"num_hidden_layers": options.blocks, "dtype": "float32"}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: options.blocks]
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.folder.glob("tokenizer*"):
        shutil.copy(path, options.out)


if __name__ == "__main__":
    main()
