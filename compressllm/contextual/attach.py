"""Put a neuron selector on a model in memory, and take it off again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.contextual.checked import CheckedLinear, takes
from compressllm.contextual.coarse import PromptMlp, check_gatherable
from compressllm.contextual.control import Control, Mode
from compressllm.contextual.fine import TokenMlp
from compressllm.contextual.inputs import InputLinear, linears_in
from compressllm.contextual.mlp import Mlp, find_mlps
from compressllm.contextual.runner import Runner
from compressllm.core.errors import RecipeError, UnsupportedModelError
from compressllm.core.protocols import (
    NEURON_SELECTORS,
    InputSelector,
    NeuronSelector,
    PromptSelector,
    TokenSelector,
)
from compressllm.core.registry import Spec, build
from compressllm.models.blocks import find_blocks


class Contextual:
    """A model whose tokens can be drafted with few neurons. Changes how the model computes until it is detached.

    Nothing of the model's parameters is changed or replaced: its modules' ``forward`` is.

    Args:
        model: In eval mode, its weights in memory.
        selector: A name from `compressllm list neuron-selectors`, or {name: {option: value}}.
        density: Fraction of neurons kept; of ``teal`` the fraction of the blocks' weights read.
        fitted: What `calibrate` found for a selector that looks at text.
        skip_first: Blocks at the front that stay dense.
        skip_last: Blocks at the end that stay dense.

    Raises: RecipeError, UnsupportedModelError; the model is as it was then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        selector: Spec = "griffin",
        density: float = 0.5,
        fitted: Mapping[str, Tensor] | None = None,
        skip_first: int = 0,
        skip_last: int = 0,
    ) -> None:
        if not 0 < density <= 1:
            raise RecipeError(f"density {density}: is the fraction of neurons kept, above 0 and at most 1")
        self.model, self.density, self.spec = model, density, selector
        self.selector: NeuronSelector = build(NEURON_SELECTORS, selector)
        self.fitted = dict(fitted or {})
        if self.selector.calibrated and not self.fitted:
            name = selector if isinstance(selector, str) else next(iter(selector))
            raise RecipeError(
                f"neuron selector {name}: has to look at text first; run `compressllm contextual MODEL OUT "
                f"--selector {name}` and use OUT, or take griffin, topk or {{coreinfer: {{guide: stability}}}}"
            )
        self.control = Control()
        self.blocks = find_blocks(model)
        depth = len(self.blocks.modules)
        if skip_first + skip_last >= depth:
            raise RecipeError(f"skip_first {skip_first} and skip_last {skip_last} leave none of {depth} blocks sparse")
        self._sparse = range(skip_first, depth - skip_last)
        self._stood_in: list[nn.Module] = []
        self.runners: list[Runner] = []
        try:
            self._attach()
        except BaseException:
            self.detach_()
            raise

    def begin_prompt(self) -> None:
        """Forget the prompt before."""
        for runner in self.runners:
            if isinstance(runner, PromptMlp):
                runner.begin()

    def choose_neurons(self) -> None:
        """Once a prompt went through the model: choose and gather, if neurons are chosen by prompt."""
        watching = [runner for runner in self.runners if isinstance(runner, PromptMlp)]
        if watching:
            counts = [runner.count_kept for runner in watching]
            scores = [runner.scores for runner in watching]
            for runner, score in zip(
                watching, cast(PromptSelector, self.selector).choose(scores, counts, self.fitted), strict=True
            ):
                runner.choose(score)

    def reset_counts(self) -> None:
        """Forget what was read so far."""
        for runner in self.runners:
            runner.passes, runner.fractions = 0, 0.0

    def detach_(self) -> None:
        """Leave the model as it was."""
        for module in self._stood_in:
            vars(module).pop("forward", None)
        self._stood_in.clear()

    def _attach(self) -> None:
        self._attach_selector()
        inside = {id(module) for module in self._stood_in}
        linears = [one for block in self.blocks.modules for one in block.modules()]
        for linear in (*linears, self.model.get_output_embeddings()):
            if isinstance(linear, nn.Linear) and takes(linear) and id(linear) not in inside:
                self._replace_forward(linear, CheckedLinear(linear, self.control))

    def _attach_selector(self) -> None:
        if self.selector.level == "input":
            self._attach_to_linears(cast(InputSelector, self.selector))
            return
        for at, mlp in enumerate(find_mlps(self.blocks)):
            runner: Runner
            if self.selector.level == "prompt":  # of all MLPs, since a selector may look at one that stays dense
                check_gatherable(mlp)
                density = self.density if at in self._sparse else 1.0
                runner = PromptMlp(mlp, cast(PromptSelector, self.selector), density, self.control)
            elif at not in self._sparse:
                continue
            else:
                runner = TokenMlp(mlp, cast(TokenSelector, self.selector), self.density, self.fitted, self.control)
            self.runners.append(runner)
            self._stand_in_for(mlp, runner)

    def _attach_to_linears(self, selector: InputSelector) -> None:
        cuts = selector.thresholds(self.density, self.fitted)
        for at in self._sparse:
            for name, linear in linears_in(self.blocks.modules[at], self.blocks.name(at)).items():
                if name not in cuts:
                    raise RecipeError(
                        f"neuron selector teal: its calibration has no {name}; calibrate it on this model"
                    )
                table = self.fitted[name]
                above = float((table > cuts[name]).float().mean())
                runner = InputLinear(linear, cuts[name], above, self.control)
                self.runners.append(runner)
                self._replace_forward(linear, runner)

    def _stand_in_for(self, mlp: Mlp, runner: Runner) -> None:
        if not mlp.inline:
            self._replace_forward(mlp.module, runner)
            return
        if mlp.act_module is None:
            raise UnsupportedModelError(f"{mlp.name}: calls its activation as a function, which cannot be stood in for")
        self._replace_forward(mlp.gate.module, runner)
        for module in (mlp.act_module, mlp.down.module):
            self._replace_forward(module, _same)

    def _replace_forward(self, module: nn.Module, forward: object) -> None:
        module.forward = forward  # type: ignore[assignment]
        self._stood_in.append(module)


def _same(x: Tensor) -> Tensor:
    return x


def prompt_through(contextual: Contextual, ids: Tensor) -> None:
    """Put a prompt through the model for its selector to look at, keeping nothing else.

    Args:
        ids: (1, tokens).
    """
    contextual.begin_prompt()
    with contextual.control.set(Mode.PREFILL), torch.inference_mode():
        contextual.model.base_model(input_ids=ids, use_cache=False)
    contextual.choose_neurons()
