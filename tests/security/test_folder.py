"""What counts as part of a checkpoint folder, and what its sizes may ask for."""

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from compressllm.calibration.source import open_source
from compressllm.core.errors import CalibrationError, FormatError
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import skeleton
from compressllm.recover.records import RecordConfig, Tally
from compressllm.recover.records import read_records as read_answers
from compressllm.select.records import read_records

FILES = ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path, name: str, relative: bool) -> None:
    secret = tmp_path / f"secret{Path(name).suffix}"
    (model / name).rename(secret)
    (model / name).symlink_to(f"../{secret.name}" if relative else secret)
    with pytest.raises(FormatError, match=f"{name}: lies outside its folder"):
        Checkpoint(model)


def test_a_link_that_is_no_part_of_the_model_is_not_copied_along(model: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(FormatError, match=r"notes\.txt: lies outside"):
        Checkpoint(model)


def test_links_within_the_folder_and_into_the_hub_s_cache_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "weights").mkdir()
    (model / "model.safetensors").rename(model / "weights" / "w")
    (model / "model.safetensors").symlink_to("weights/w")
    Checkpoint(model)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(FILES):
        (model / name).resolve().rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert Checkpoint(snapshot).config().model_type == "llama"
    (tmp_path / "link").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "link").specs


@pytest.mark.parametrize("name", FILES)
def test_devices_and_pipes_are_refused_without_waiting_for_them(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="lies outside"):
        Checkpoint(model)
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(FormatError, match="is no regular file"):
        Checkpoint(model)


def test_a_config_of_more_blocks_than_tensors_is_refused_before_they_are_built(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(FormatError, match="num_hidden_layers 1000000000, the weights are"):
        skeleton(Checkpoint(model))


def test_a_config_that_asks_for_huge_buffers_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "head_dim": 2**30}))  # a rotary frequency for every two
    with pytest.raises(FormatError, match=r"asks for .* bytes of buffers"):
        skeleton(Checkpoint(model))


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """A gigabyte of text in a megabyte."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(10):
            file.write(b"a" * (10 << 20))
    return path


def test_a_gzip_bomb_is_given_up_on(bomb: Path) -> None:
    for read in (
        lambda: list(open_source(str(bomb)).texts("calibration")),
        lambda: read_records(bomb),
        lambda: list(read_answers(bomb, RecordConfig(), Tally())),
    ):
        with pytest.raises(CalibrationError, match=r"bomb\.jsonl\.gz: is a gzip file that grows to over 100 times"):
            read()


def test_a_parquet_bomb_is_given_up_on(tmp_path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, dtype=np.int32)), pa.array(["a" * 10_000]))
    parquet.write_table(pa.table({"text": text}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000  # of two gigabytes
    with pytest.raises(CalibrationError, match=r"bomb\.parquet: is a parquet file that grows"):
        list(open_source(str(tmp_path / "bomb.parquet")).texts("calibration"))


def test_token_ids_of_a_shape_that_is_not_there_cost_nothing(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**40, 2)})
    (tmp_path / "ids.npy").write_bytes(file.getvalue() + b"\0" * 64)
    with pytest.raises(CalibrationError, match=r"ids\.npy: is not a whole \.npy file"):
        open_source(str(tmp_path / "ids.npy")).read()
