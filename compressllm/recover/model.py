"""Train a pruned model back towards its dense teacher."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from compressllm.core.cache import cache_folder
from compressllm.core.compute import choose_device, training_dtype
from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.masks import MaskStore
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle
from compressllm.models.record import computed_on
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
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.packing import PackedRows
from compressllm.recover.publish import publish, put_back_
from compressllm.recover.sharding import Sharding, make_sharding
from compressllm.recover.trainee import Trainee


def recover_model(
    bundle: Bundle, config: RecoverConfig | None = None, run: Run | None = None, *, held_out: int | None = None
) -> Bundle:
    """Train what is kept of a pruned model, towards its dense teacher if there is one, under its masks.

    A bundle with a checkpoint is trained in memory and written anew to ``run.folder``; a killed call goes on from the
    last checkpoint there, on a CPU to the same result, bit for bit. A bundle that holds its weights itself is changed
    in place.

    Args:
        held_out: Windows that are held out at most; as many as its tokens allow unless given. Trainings on the same
            data with the same number hold out the same.

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
    data = load_data(config, bundle, run, held_out)

    dtype = _compute_dtype(bundle, config, device)
    packed = isinstance(data.train, PackedRows)
    trainee = Trainee(bundle, held, config, sharding, dtype, run.seed, packed)
    cached = CacheOptions(cache_folder() / "teachers", config.teacher_cache) if config.teacher_cache else None
    weights, model = config.loss_weights, trainee.model
    guide = make_guide(
        weights, config.teacher, bundle, model, device, dtype, cached=cached, rows=data.train, run=run,
        sharding=sharding, paper_exact=config.paper_exact,
    )  # fmt: skip
    masking = make_masking(bundle, held, trainee.shapes, config, sharding)
    optimizer = Optimizer(trainee.local(), masking, config.betas, config.weight_decay)
    trainee.take_stored_(optimizer)
    fingerprint = {
        "settings": config.model_dump(mode="json"),
        "seed": run.seed,
        "data": data.train.sha256,
        "masks": held.masks.sha256(),
        **computed_on(bundle.checkpoint, dtype, device),
    }
    run.ranks.agree(fingerprint)
    shapes = optimizer.shapes(trainee.shapes)
    checkpoints = Checkpoints(run.folder, fingerprint, shapes, optimizer, masking, sharding)
    training = Training(
        config=config,
        accelerator=accelerator,
        student=trainee.student,
        guide=guide,
        data=data.train,
        held_out=HeldOut(data.held_out, sharding, config.micro_batch),
        optimizer=optimizer,
        gradients=Gradients(trainee.parameters, sharding.local),
        masking=masking,
        sharding=sharding,
        checkpoints=checkpoints,
        run=run,
    )
    progress = training.train_()

    trained, branches = trainee.finish_(optimizer)
    if branches:  # without them the model computes something else
        progress.best["nll"] = training.held_out.student_nll(trainee.student)
        if branches["export"] == "merge":
            run.warn(f"slorb: its branches are merged, so that {len(held.linears)} linears are dense from now on")
            held = replace(held, linears={}, patterns={}, masks=MaskStore())
    masks = final_masks(held, masking, trainee.shapes, sharding)
    if bundle.checkpoint is not None and run.folder is not None:
        recovered = publish(bundle, run.folder, held, masks, trained, run.ranks)
    else:
        recovered = put_back_(bundle, held, masks, trained)
    run.defer(checkpoints.clean)
    run.metrics.update(
        linears=len(recovered.masks),
        sparsity=recovered.masks.sparsity() if recovered.masks else 0.0,
        masks_sha256=recovered.masks.sha256(),
        masks_from=held.origin,
        trained_parameters=sum(math.prod(shape) for shape in trainee.shapes.values()),
        slorb=branches or None,
        **progress.facts(),
        data=data.facts,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        gpu_peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        processes=run.ranks.size,
    )
    return recovered


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
    return bundle.stored_dtype if bundle.checkpoint is None else training_dtype(config.dtype, device)
