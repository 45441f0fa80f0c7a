"""Recipes of llm-compressor as ours, and a line for each thing that is not as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from compressllm.core.errors import RecipeError
from compressllm.stages.recipe import Recipe, make_recipe
from compressllm.stages.yamltext import read_yaml

#: The text that its users calibrate on is no part of its recipes.
_CALIBRATION: Final = {"source": "c4", "samples": 128, "seqlen": 2048}

#: Preset schemes that ours has an equal of; the case does not matter.
_SCHEMES: Final = {
    "w4a16": "int4-g128",
    "w8a16": "int8",
    "w8a8": "int8",
    "int8": "int8",
    "fp8": "fp8",
    "fp8_dynamic": "fp8",
}

#: What is never pruned or quantised by ours, so that it need not be left out.
_NEVER: Final = {"lm_head", "embed_tokens", "gate", "router"}

#: Settings that only say how its own program works.
_INTERNAL: Final = {
    "sequential_update", "sequential_targets", "offload_hessians", "start", "end", "update", "update_scheduler",
    "scheduler_args", "leave_enabled", "group", "index", "initialized", "preserve_sparsity_mask", "quantize",
    "disable_quantization_observer_epoch", "num_calibration_steps",
}  # fmt: skip


class Converted(NamedTuple):
    """A recipe of ours.

    Args:
        notes: One line for each thing that could not be converted, or is done differently.
    """

    recipe: Recipe
    notes: list[str]


def convert_recipe(path: Path, model: str) -> Converted:
    """Read a recipe of llm-compressor, with stages or without.

    Pruning, fixed masks while training, and quantisation of weights are converted; nothing else has an equal.

    Args:
        model: What the recipe is to work on: theirs do not say.

    Raises: RecipeError if it cannot be read, or nothing in it has an equal.
    """
    fields, _ = read_yaml(path)
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{path}: holds no stages; is it a recipe of llm-compressor?")
    notes: list[str] = []
    stages = [stage for one in _modifiers(fields, notes) if (stage := _converted(one, model, notes))]
    if not stages:
        told = "".join(f"; {note}" for note in notes)
        raise RecipeError(f"{path}: holds nothing that can be converted{told}")
    if stages != (last := sorted(stages, key=lambda stage: "quantize" in stage)):
        notes.append("quantize: comes last here, since pruning and training make plain weights of codes")
        stages = last
    if any("calibration" in settings for stage in stages for settings in stage.values()):
        notes.append("calibration: theirs is given to oneshot(), not in the recipe; 128 windows of C4 are put here")
    if "quantize" not in stages[-1]:
        stages.append({"export": {"format": "packed"}})  # quantize writes packed by itself
    recipe = {"model": model, "description": f"Converted from {path.name} of llm-compressor", "stages": stages}
    return Converted(make_recipe(recipe), notes)


class _Modifier(NamedTuple):
    """One modifier: where it stands, its class, its settings, and whether its stage trains."""

    where: str
    name: str
    settings: dict[str, Any]
    trains: bool


def _modifiers(
    fields: Mapping[str, Any], notes: list[str], where: str = "", trains: bool = False
) -> Iterator[_Modifier]:
    for key, value in fields.items():
        place = f"{where}{key}"
        if isinstance(value, Mapping) and str(key).endswith("stage"):
            yield from _modifiers(value, notes, f"{place}.", value.get("run_type") == "train")
        elif str(key).endswith("modifiers"):
            groups = [value] if isinstance(value, Mapping) else value or ()
            for name, settings in ((n, s) for group in groups if isinstance(group, Mapping) for n, s in group.items()):
                yield _Modifier(f"{place}.{name}", str(name), dict(settings or {}), trains)
        elif key not in {"run_type", "version"}:
            notes.append(f"{place}: has no equal, left out")


def _converted(modifier: _Modifier, model: str, notes: list[str]) -> dict[str, Any] | None:
    convert = _CONVERTERS.get(modifier.name)
    if convert is None:
        notes.append(f"{modifier.where}: has no equal, left out")
        return None
    settings = modifier.settings
    computed = [key for key, value in settings.items() if str(value).startswith("eval(")]
    if computed:
        raise RecipeError(f"{modifier.where}.{computed[0]}: is computed from a variable; write its value there")
    stage = convert(modifier, model, notes)
    notes += [f"{modifier.where}.{key}: has no equal, left out" for key in settings if key not in _INTERNAL]
    return stage


def _prune(modifier: _Modifier, model: str, notes: list[str]) -> dict[str, Any]:
    """SparseGPT, Wanda and magnitude."""
    where, settings = modifier.where, modifier.settings
    magnitude = modifier.name == "MagnitudePruningModifier"
    sparsity = settings.pop("final_sparsity" if magnitude else "sparsity", None)
    structure = str(settings.pop("mask_structure", "0:0"))
    if not isinstance(sparsity, int | float):
        raise RecipeError(f"{where}: sparsity is {sparsity!r}; one number is converted, write patterns by hand")
    if magnitude:
        settings.pop("init_sparsity", None)
        notes.append(f"{where}: prunes in one step, where theirs does in many while it trains")
        if settings.pop("apply_globally", False):
            notes.append(f"{where}.apply_globally: each linear keeps as much here; see allocation: global")
    pattern = _pattern(structure, sparsity, where)
    stage: dict[str, Any] = {"method": _pruner(modifier.name, settings), "pattern": pattern}
    if settings.pop("sparsity_profile", None) == "owl":
        spread, threshold = settings.pop("owl_lmbda", None), settings.pop("owl_m", None)
        given = {"threshold": float(threshold) if threshold is not None else None, "spread": spread}
        stage["allocation"] = {"owl": {key: value for key, value in given.items() if value is not None}}
    if targets := _globs(settings.pop("targets", "Linear"), f"{where}.targets", notes):
        stage["patterns"] = {**dict.fromkeys(targets, pattern), "*": "dense"}
    stage["skip"] = _globs(settings.pop("ignore", ()), f"{where}.ignore", notes)
    stage["calibration"] = _CALIBRATION
    return {"prune": {key: value for key, value in stage.items() if value}}


def _pattern(structure: str, sparsity: float, where: str) -> str:
    """Theirs counts the weights that go, ours those that stay."""
    if structure in {"0:0", "unstructured"}:
        return f"{sparsity:g}"
    counts = re.fullmatch(r"(\d+):(\d+)", structure)
    if counts is None:
        raise RecipeError(f"{where}.mask_structure: {structure!r} has no equal; N:M and unstructured are converted")
    removed, of = int(counts[1]), int(counts[2])
    return f"{of - removed}:{of}"


def _pruner(name: str, settings: dict[str, Any]) -> Any:
    if name != "SparseGPTModifier":
        return "magnitude" if name == "MagnitudePruningModifier" else "wanda"
    return _with_options("sparsegpt", settings)


def _with_options(method: str, settings: dict[str, Any]) -> Any:
    """A solver and its block and damping, where those are not what ours has anyway."""
    older = settings.pop("percdamp", None)
    damping, block = settings.pop("dampening_frac", older), settings.pop("block_size", None)
    options = {"block": block if block != 128 else None, "damping": damping if damping != 0.01 else None}
    options["order"] = settings.pop("order", None)
    given = {key: value for key, value in options.items() if value is not None}
    return {method: given} if given else method


def _constant(modifier: _Modifier, model: str, notes: list[str]) -> dict[str, Any] | None:
    """Masks that stay while something else changes the weights: here they always do."""
    modifier.settings.pop("targets", None)
    if not modifier.trains:
        return None
    notes.append(f"{modifier.where}: text, steps and learning rate are arguments of their trainer; look over recover")
    return {"recover": {"losses": "ce=1.0", "data": ["c4"], "masking": "fixed"}}


def _distillation(modifier: _Modifier, model: str, notes: list[str]) -> dict[str, Any]:
    modifier.settings.clear()
    notes.append(f"{modifier.where}: text, steps and learning rate are arguments of their trainer; look over recover")
    return {"recover": {"teacher": model, "losses": "kl=1.0", "data": ["c4"], "masking": "fixed"}}


def _quantize(modifier: _Modifier, model: str, notes: list[str]) -> dict[str, Any] | None:
    """GPTQ and rounding to nearest."""
    where, settings = modifier.where, modifier.settings
    groups, preset = settings.pop("config_groups", None), settings.pop("scheme", None)
    if isinstance(preset, Mapping):
        preset, settings["targets"] = next(iter(preset.items()), (None, None))
    if groups:
        scheme = _scheme_of_groups(groups, where, notes)
    else:
        scheme = _SCHEMES.get(str(preset).lower())
        if scheme is None:
            notes.append(f"{where}.scheme: {preset} has no equal, left out; ours are int8, int4 and fp8 weights")
        elif not str(preset).lower().endswith("a16"):
            notes.append(_activations(where))
    if scheme is None:
        settings.clear()
        return None
    gptq = modifier.name == "GPTQModifier"
    orders = [_weights_of(group).get("actorder") for group in (groups or {}).values()]
    if settings.pop("actorder", "static") is None and not any(orders) and gptq:
        settings["order"] = "natural"  # by size unless told not to, theirs as ours
    if targets := _globs(settings.pop("targets", "Linear"), f"{where}.targets", notes):
        notes.append(f"{where}.targets: {', '.join(targets)}: all linears are quantised here but those under skip")
    stage = {
        "scheme": scheme,
        "method": _with_options("gptq", settings) if gptq else "rtn",
        "skip": _globs(settings.pop("ignore", ()), f"{where}.ignore", notes),
        "calibration": _CALIBRATION if gptq else None,
    }
    return {"quantize": {key: value for key, value in stage.items() if value}}


def _scheme_of_groups(groups: Mapping[str, Any], where: str, notes: list[str]) -> str | None:
    first, *others = groups.items()
    notes += [f"{where}.config_groups.{name}: a model has one scheme here, that of {first[0]}" for name, _ in others]
    place, group = f"{where}.config_groups.{first[0]}", first[1] or {}
    weights = _weights_of(group)
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    if (bits, kind) not in {(4, "int"), (8, "int"), (8, "float")}:
        notes.append(f"{place}: weights of {bits} bits, {kind}, have no equal, left out; ours are int8, int4 and fp8")
        return None
    if group.get("input_activations"):
        notes.append(_activations(where))
    if weights.get("symmetric") is False:
        notes.append(f"{place}.weights.symmetric: codes are symmetric here")
    if weights.get("actorder") == "group":
        notes.append(f"{place}.weights.actorder: groups are of neighbours here, whatever order columns are taken in")
    if bits == 8:
        if size:
            notes.append(f"{place}.weights.group_size: one scale a row here")
        return "fp8" if kind == "float" else "int8"
    if size not in {32, 64, 128}:
        notes.append(f"{place}.weights: {size or 'one scale a row'} becomes groups of 128, which are finer")
        size = 128
    return f"int4-g{size}"


def _weights_of(group: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (group or {}).get("weights") or {}


def _activations(where: str) -> str:
    return f"{where}: only weights are quantised; kernels of integer weights round their inputs as they run"


def _globs(targets: Any, where: str, notes: list[str]) -> list[str]:
    """Globs of linears for their names, classes and regular expressions; none for all linears."""
    found = []
    for target in [targets] if isinstance(targets, str) else targets or ():
        glob = _glob(str(target))
        if glob is None:
            notes.append(f"{where}: {target} cannot be written as a glob; name those linears by hand")
        elif glob.strip("*").rpartition(".")[2] not in _NEVER and glob != "*":
            found.append(glob)
    return found


def _glob(target: str) -> str | None:
    """``*`` for all linears; None if there is none. A regular expression of theirs holds from a name's beginning on."""
    if target.startswith("__ALL") or re.fullmatch(r"Linear|\w+(Layer|Block)", target):
        return "*"
    if not target.startswith("re:"):
        name = target.removesuffix(".weight")
        return f"{name}.*" if name.rpartition(".")[2].isdigit() else name
    pattern = target.removeprefix("re:").removeprefix("^")
    ends = pattern.endswith("$")
    pattern = pattern.removesuffix("$")
    if not ends and re.search(r"\\?\.weight$", pattern):  # a parameter's name ends there anyway
        pattern, ends = re.sub(r"\\?\.weight$", "", pattern), True
    plain = re.sub(r"\\d[*+]|\[0-9\][*+]|\.[*+]", "*", pattern).replace("\\.", ".")
    if re.search(r"[\\()\[\]|?+{}^$]", plain):
        return None
    if not ends:
        plain += "*"
    elif plain.rpartition(".")[2].strip("*").isdigit() or plain.endswith(".*"):  # a whole block
        plain += ".*" if not plain.endswith(".*") else ""
    return re.sub(r"\*+", "*", plain)


_CONVERTERS: Final[Mapping[str, Callable[[_Modifier, str, list[str]], dict[str, Any] | None]]] = {
    "SparseGPTModifier": _prune,
    "WandaPruningModifier": _prune,
    "MagnitudePruningModifier": _prune,
    "ConstantPruningModifier": _constant,
    "OutputDistillationModifier": _distillation,
    "GPTQModifier": _quantize,
    "QuantizationModifier": _quantize,
}
