"""What a checkpoint's own model card says that has to be passed on: its licence, and what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import yaml

from compressllm.core.errors import FormatError
from compressllm.models.sidefiles import inside

_KEYS: Final = ("license", "license_name", "license_link", "base_model")
_MOST_BYTES: Final = 1 << 20


def card_facts(folder: Path) -> dict[str, str]:
    """Licence and base model out of the metadata of ``README.md``; empty if there is none, or it cannot be read."""
    try:
        with inside(folder, "README.md").open(encoding="utf-8") as file:
            text = file.read(_MOST_BYTES)
        fence, head, _ = text.split("---\n", 2)
        found = yaml.safe_load(head) if not fence.strip() else None
    except (FormatError, OSError, ValueError, RecursionError, yaml.YAMLError):  # a card is never needed
        return {}
    if not isinstance(found, dict):
        return {}
    plain = {key: one[0] if isinstance(one := found.get(key), list) and len(one) == 1 else one for key in _KEYS}
    return {key: one for key, one in plain.items() if isinstance(one, str) and one.isprintable() and len(one) < 300}
