"""Train a pruned model back towards its dense teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressllm.core.compute import choose_device
from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.protocols import ADAPTERS
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.linears import held_otherwise
from compressllm.models.loading import tensor_names
from compressllm.models.record import computed_on
from compressllm.recover.attaching import final_masks, make_masking
from compressllm.recover.checkpoint import Checkpoints
from compressllm.recover.config import RecoverConfig
from compressllm.recover.gradients import Gradients
from compressllm.recover.held import find_held
from compressllm.recover.launching import accelerator_for
from compressllm.recover.loop import Progress, Training
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.publish import publish, put_back_
from compressllm.recover.sharding import Sharding, make_sharding
from compressllm.recover.standin import make_guide
from compressllm.recover.student import Student, checkpoint_activations_
from compressllm.recover.textdata import load_text


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
    data = load_text(
        config.data,
        bundle.tokenizer,
        config.seqlen,
        config.mixture,
        config.held_out,
        max_tokens=config.max_tokens,
        max_seqlen=bundle.max_seqlen,
        vocab_size=bundle.vocab_size,
    )
    for note in data.notes:
        run.warn(note)

    dtype = _compute_dtype(bundle, config, device)
    model = bundle.live(dtype, device)
    model.requires_grad_(True)
    student: nn.Module = Student(model, config.temperature)
    guide = make_guide(config, bundle, model, device, dtype)
    blocks = find_blocks(model).modules
    adapter = None if config.train == "all" else build(ADAPTERS, config.train, {"seed": run.seed})
    plain = set(dict(model.named_parameters()))
    if adapter:
        adapter.attach_(model, held.masks)
    if config.activation_checkpointing:
        checkpoint_activations_(blocks)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    sharding.wrap_(student, blocks)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    masking = make_masking(held, parameters, shapes, config, sharding)
    optimizer = Optimizer(
        {name: sharding.local(parameter.detach()) for name, parameter in parameters.items()},
        masking,
        config.betas,
        config.weight_decay,
    )
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
    gradients = Gradients(parameters, sharding.local)
    training = Training(
        accelerator,
        student,
        guide,
        data.train,
        data.held_out,
        optimizer,
        gradients,
        masking,
        sharding,
        checkpoints,
        config,
        run,
    )
    progress = training.train_()

    masks = final_masks(held, masking, shapes, sharding)

    changed = set(shapes)
    if adapter:
        for name, parameter in parameters.items():
            parameter.data = optimizer.weights[name]
        adapter.merge_(model)
        changed = {name if name in plain else f"{name.rpartition('.')[0]}.weight" for name in shapes}

    def trained(name: str) -> Tensor | None:
        if name not in changed:
            return None
        return model.get_parameter(name).detach() if adapter else sharding.whole(optimizer.result(name), shapes[name])

    if bundle.checkpoint is not None and run.folder is not None:
        recovered = publish(bundle, run.folder, held, masks, trained, run.ranks)
    else:
        recovered = put_back_(bundle, held, masks, trained)
    checkpoints.clean()
    run.metrics.update(_facts(progress, recovered, None))
    run.metrics.update(
        masks_from=held.origin,
        trained_parameters=sum(math.prod(shape) for shape in shapes.values()),
        data=data.facts,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
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


def _facts(progress: Progress, recovered: Bundle, teacher_nll: float | None) -> dict[str, Any]:
    """What training came to, for the manifest. The gap is that between the teacher and the student before."""
    before, after = progress.before, progress.best["nll"]
    perplexities = {"before": before, "after": after, "teacher": teacher_nll}
    told = {name: math.exp(min(nll, 700.0)) for name, nll in perplexities.items() if nll is not None}
    gap = told["before"] - told.get("teacher", math.inf)
    return {
        "linears": len(recovered.masks),
        "sparsity": recovered.masks.sparsity(),
        "masks_sha256": recovered.masks.sha256(),
        "steps": progress.step,
        "best_step": progress.best["step"],
        "tokens": progress.tokens,
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "held_out_perplexity": told,
        "gap_closed": (told["before"] - told["after"]) / gap if math.isfinite(gap) and gap > 0 else None,
        "masks_last_refresh": progress.masks or None,
    }
