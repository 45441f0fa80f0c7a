"""Train a pruned model back towards its dense teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from compressllm.core.cache import cache_folder
from compressllm.core.compute import choose_device
from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.protocols import ADAPTERS, Adapter
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.linears import held_otherwise
from compressllm.models.record import computed_on
from compressllm.models.tensornames import tensor_names
from compressllm.recover.adapters.trainable import trainable
from compressllm.recover.attaching import final_masks, make_masking
from compressllm.recover.checkpoint import Checkpoints
from compressllm.recover.config import RecoverConfig
from compressllm.recover.data import load_data
from compressllm.recover.gradients import Gradients
from compressllm.recover.guide import CacheOptions, make_guide
from compressllm.recover.held import find_held
from compressllm.recover.heldout import HeldOut
from compressllm.recover.launching import accelerator_for
from compressllm.recover.loop import Training
from compressllm.recover.losses import LossWeights
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.publish import Trained, publish, put_back_
from compressllm.recover.sharding import Sharding, make_sharding
from compressllm.recover.student import Student, checkpoint_activations_


def recover_model(bundle: Bundle, config: RecoverConfig | None = None, run: Run | None = None) -> Bundle:
    """Train what is kept of a pruned model, towards its dense teacher if there is one, under its masks.

    A bundle with a checkpoint is trained in memory and written anew to ``run.folder``; a killed call goes on from the
    last checkpoint there, on a CPU to the same result, bit for bit. A bundle that holds its weights itself is changed
    in place.

    Raises: RecipeError, FormatError, CalibrationError, UnsupportedModelError; RunError if ``run.folder`` holds a call
        with other settings; TrainingError if training diverges, or what it leaves breaks a pattern.
    """
    config, run = config or RecoverConfig(), run or Run()
    if bundle.checkpoint is not None and run.folder is None:
        raise FormatError("recovering a checkpoint writes a checkpoint: give the run a folder")
    device = run.ranks.own_device(choose_device(config.device))
    accelerator, sharding = accelerator_for(device, run.ranks), make_sharding(config.sharding, run.ranks, device)
    _check_share(config, sharding)
    held = find_held(bundle, config, run)
    data = load_data(config, bundle, run)

    dtype = _compute_dtype(bundle, config, device)
    model = bundle.live(dtype, device)
    model.requires_grad_(True)
    student: nn.Module = Student(model, config.temperature)
    guide = make_guide(
        LossWeights.parse(config.losses), config.teacher, bundle, model, device, dtype,
        cached=CacheOptions(cache_folder() / "teachers", config.teacher_cache) if config.teacher_cache else None,
        rows=data.train, run=run,
    )  # fmt: skip
    adapter = None if config.train == "all" else build(ADAPTERS, config.train, {"seed": run.seed})
    plain = set(dict(model.named_parameters()))
    if adapter:
        adapter.attach_(model, held.masks)
    blocks = find_blocks(model).modules
    if config.activation_checkpointing:
        checkpoint_activations_(blocks)
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    sharding.wrap_(student, blocks)
    parameters = trainable(model)
    masking = make_masking(held, parameters, shapes, config, sharding)
    local = {name: sharding.local(parameter.detach()) for name, parameter in parameters.items()}
    optimizer = Optimizer(local, masking, config.betas, config.weight_decay)
    _take_stored_(optimizer, bundle, dtype, sharding)

    fingerprint = {
        "settings": config.model_dump(mode="json"),
        "seed": run.seed,
        "data": data.train.sha256,
        "masks": held.masks.sha256(),
        **computed_on(bundle.checkpoint, dtype, device),
    }
    run.ranks.agree(fingerprint)
    checkpoints = Checkpoints(run.folder, fingerprint, shapes, optimizer, masking, sharding)
    training = Training(
        config=config,
        accelerator=accelerator,
        student=student,
        guide=guide,
        data=data.train,
        held_out=HeldOut(data.held_out, sharding, config.micro_batch),
        optimizer=optimizer,
        gradients=Gradients(parameters, sharding.local),
        masking=masking,
        sharding=sharding,
        checkpoints=checkpoints,
        run=run,
    )
    progress = training.train_()

    if adapter:
        trained = _merged(adapter, model, parameters, optimizer, plain)
    else:
        trained = lambda name: sharding.whole(optimizer.result(name), shapes[name]) if name in shapes else None  # noqa: E731
    masks = final_masks(held, masking, shapes, sharding)
    if bundle.checkpoint is not None and run.folder is not None:
        recovered = publish(bundle, run.folder, held, masks, trained, run.ranks)
    else:
        recovered = put_back_(bundle, held, masks, trained)
    checkpoints.clean()
    run.metrics.update(
        linears=len(recovered.masks),
        sparsity=recovered.masks.sparsity(),
        masks_sha256=recovered.masks.sha256(),
        masks_from=held.origin,
        trained_parameters=sum(math.prod(shape) for shape in shapes.values()),
        **progress.facts(),
        data=data.facts,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        gpu_peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        processes=run.ranks.size,
    )
    return recovered


def _merged(
    adapter: Adapter, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, plain: set[str]
) -> Trained:
    """Merge an adapter into the model, in place; gives the values of what it changed, of parameters named ``plain``."""
    for name, parameter in parameters.items():
        parameter.data = optimizer.weights[name]
    adapter.merge_(model)
    changed = {name if name in plain else f"{name.rpartition('.')[0]}.weight" for name in parameters}
    return lambda name: model.get_parameter(name).detach() if name in changed else None


def _check_share(config: RecoverConfig, sharding: Sharding) -> None:
    """Raise RecipeError if the windows of a step cannot be shared by the processes of this launch."""
    windows, size = config.windows_per_step, sharding.ranks.size
    if windows < size or (sharding.name != "replicated" and windows % size):
        raise RecipeError(
            f"batch_tokens {config.batch_tokens} make {windows} windows of {config.seqlen} tokens a step, which "
            f"{size} processes cannot share {'evenly' if windows > size else ''}; give a multiple of "
            f"{size * config.seqlen}"
        )


def _compute_dtype(bundle: Bundle, config: RecoverConfig, device: torch.device) -> torch.dtype:
    if bundle.checkpoint is None:
        return bundle.stored_dtype
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def _take_stored_(optimizer: Optimizer, bundle: Bundle, dtype: torch.dtype, sharding: Sharding) -> None:
    """Begin from the weights as they are stored, where they have been rounded to compute with."""
    if bundle.checkpoint is None or dtype == torch.float32:
        return
    special = held_otherwise(bundle.model)
    for name, stored in tensor_names(bundle.model, bundle.checkpoint).items():
        spec = bundle.checkpoint.specs[stored]
        if name in optimizer.weights and name not in special and spec.dtype.itemsize > dtype.itemsize:
            optimizer.weights[name].copy_(sharding.rows(bundle.checkpoint.read(stored)))
