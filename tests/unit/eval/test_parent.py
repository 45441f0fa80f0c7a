"""How often two models say the same."""

import torch

from compressllm.eval.parent import Answers, agreement, answers


def test_counts_what_is_the_same():
    """Three of four next tokens; prefixes of 3 and 1 of three tokens."""
    one = Answers(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7], [5, 6, 7]]))
    other = Answers(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[5, 6, 7], [5, 0, 7]]))
    found = agreement(one, other)
    assert found["next_token"] == 0.75
    assert (found["same_prefix"], found["identical"], found["prompts"]) == (2.0, 1, 2)


def test_answers_are_the_likeliest_tokens(llama):
    windows = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    llama.config.max_position_embeddings = 256
    found = answers(llama, windows)
    with torch.no_grad():
        for row in range(2):
            ids = windows[row].tolist()
            for at in range(7):
                assert found.following[row, at] == llama(torch.tensor([ids[: at + 1]])).logits[0, -1].argmax()
            for new in found.written[row, :5].tolist():
                logits = llama(torch.tensor([ids])).logits[0, -1]
                logits[2] = -torch.inf  # the end of text is not taken
                assert new == logits.argmax()
                ids.append(new)
    assert found.written.shape == (2, 64)
