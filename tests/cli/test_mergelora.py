"""``compressllm merge-lora`` on the trained tiny model, and an adapter given as a model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file


def test_merges_only_when_told_that_a_part_is_dropped(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    assert cli("prune", tiny, tmp_path / "run", "--method", "magnitude", "--pattern", "2:4").code == 0
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    config = json.loads((Path(tiny) / "config.json").read_text())
    size = config["hidden_size"]
    (tmp_path / "lora").mkdir()
    save_file(
        {f"{name}.lora_A.weight": torch.randn(2, size), f"{name}.lora_B.weight": torch.randn(size, 2)},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))

    plain = cli("merge-lora", tmp_path / "run", tmp_path / "lora", tmp_path / "out")
    assert plain.code == 2
    assert "would fill them" in plain.err
    assert "masklora" in plain.err
    assert not (tmp_path / "out").exists()
    masked = cli("merge-lora", tmp_path / "run", tmp_path / "lora", tmp_path / "out", "--masked")
    assert masked.code == 0
    assert "fell on pruned weights and was dropped" in masked.out
    assert cli("verify", tmp_path / "out", "--pattern", "2:4").code == 0

    as_model = cli("eval", tmp_path / "lora", "--data", text)
    assert as_model.code == 2
    assert "holds an adapter of PEFT" in as_model.err
