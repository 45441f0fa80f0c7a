"""Inside model.generate: processors, criteria, streamers and sampling as ever."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from compressllm.contextual.attach import Contextual
from compressllm.contextual.generate import ContextualGenerate
from compressllm.core.errors import RecipeError

Attach = Callable[..., Contextual]
EXACT = {"sirius": {"period": 4, "rule": "exact"}}


def test_generates_the_dense_text(attached: Attach, model: PreTrainedModel, prompt: Tensor) -> None:
    for options in ({"max_new_tokens": 11}, {"max_length": 15}, {"max_new_tokens": 9, "repetition_penalty": 1.7}):
        right = model.generate(prompt, do_sample=False, **options)
        generate = ContextualGenerate(attached("griffin", 0.3), EXACT)
        assert torch.equal(model.generate(prompt, do_sample=False, custom_generate=generate, **options), right)
        assert generate.counts.tokens == right.shape[1] - 9
        generate.contextual.detach_()


def test_stops_where_a_criterion_says(attached: Attach, model: PreTrainedModel, prompt: Tensor) -> None:
    class Enough(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            return torch.tensor([input_ids.shape[1] >= 14])

    class Heard:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Heard()
    generate = ContextualGenerate(attached("griffin", 0.5), "sirius", streamer)
    made = model.generate(
        prompt,
        max_new_tokens=30,
        do_sample=False,
        custom_generate=generate,
        stopping_criteria=StoppingCriteriaList([Enough()]),
    )
    assert made.shape == (1, 14)
    assert streamer.tokens == made[0].tolist()
    assert streamer.ended


def test_samples_by_seed(attached: Attach, model: PreTrainedModel, prompt: Tensor) -> None:
    generate = ContextualGenerate(attached("griffin", 0.5), EXACT)
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(model.generate(prompt, max_new_tokens=12, do_sample=True, top_k=20, custom_generate=generate))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_several_prompts_are_refused(attached: Attach, model: PreTrainedModel, prompt: Tensor) -> None:
    generate = ContextualGenerate(attached("griffin"))
    for ids, options in (
        (prompt.repeat(2, 1), {}),
        (prompt, {"num_return_sequences": 2, "do_sample": True}),
        (prompt, {"num_beams": 2}),
        (prompt, {"attention_mask": torch.tensor([[0] + [1] * 8])}),
    ):
        with pytest.raises(RecipeError):
            model.generate(ids, max_new_tokens=4, custom_generate=generate, **options)
