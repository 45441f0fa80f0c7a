"""What the config.json of a packed checkpoint says of it, so that transformers finds our loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUANT_METHOD = "compressllm"  # the name in config.json under which transformers finds us

_NOTE = (
    "run `import compressllm` before from_pretrained(..., variant={variant!r}); transformers alone refuses the folder"
)


def stamp_config(folder: Path, format: str, version: int, variant: str | None, scheme: str | None = None) -> None:
    """Say in ``config.json`` how sparse linears are stored; nothing of a plain folder, which has no variant.

    Args:
        version: Of the schema of ``compressllm.json``.
        variant: The variant in the shards' names, or None.
        scheme: What the weights of quantised linears are rounded to, if there are any.
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    # Either key makes newer loaders refuse a plain checkpoint, whatever it says.
    config.pop("quantization_config", None)
    config.pop("sparsity_config", None)
    if variant:
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format": format,
            "version": version,
            "note": _NOTE.format(variant=variant),
            **({"scheme": scheme} if scheme else {}),
        }
    path.write_text(json.dumps(config, indent=2) + "\n")
