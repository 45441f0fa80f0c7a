import pytest
import torch

from compressllm.eval.decoding import Decoder


def greedy(decoder: Decoder, ids: torch.Tensor, steps: int) -> torch.Tensor:
    logits = decoder.prefill(ids)
    for step in range(steps):
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if step + 1 < steps:
            logits = decoder.step(ids[:, -1:])
    return ids


@pytest.mark.parametrize("batch", [1, 3])
def test_decodes_what_generate_does(decoder, batch):
    ids = torch.randint(3, 64, (batch, 5), generator=torch.Generator().manual_seed(0))
    expected = decoder.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    fixed = Decoder(decoder, length=14)
    assert torch.equal(greedy(fixed, ids, 9), expected)
    assert torch.equal(greedy(fixed, ids, 9), expected)  # nothing is left of the first time


def test_logits_are_those_of_the_model(llama, windows):
    fixed = Decoder(llama, length=20)
    with torch.inference_mode():
        exact = llama(windows).logits
    torch.testing.assert_close(fixed.prefill(windows[:, :10]), exact[:, 9])
    for at in range(10, 16):
        torch.testing.assert_close(fixed.step(windows[:, at : at + 1]), exact[:, at])
