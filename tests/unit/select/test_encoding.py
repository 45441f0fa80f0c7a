from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressllm.select.encoding import encode
from compressllm.select.records import Record

TINY = Path(__file__).parents[2] / "tiny" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def test_prompt_then_response(tokenizer: PreTrainedTokenizerBase) -> None:
    made = encode(Record((("user", "ab"),), "cd"), tokenizer, 100)
    assert tokenizer.decode(made.ids[: made.start], skip_special_tokens=True) == "ab\n"
    assert tokenizer.decode(made.ids[made.start :], skip_special_tokens=True) == "cd"
    assert made.whole
    if tokenizer.eos_token_id is not None:
        assert made.ids[-1] == tokenizer.eos_token_id


def test_a_chat_template_is_used(tokenizer: PreTrainedTokenizerBase) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    chatty = AutoTokenizer.from_pretrained(TINY, chat_template=template)
    made = encode(Record((("system", "s"), ("user", "ab")), "cd"), chatty, 100)
    assert chatty.decode(made.ids[: made.start]) == "<system>s<user>ab<me>"
    assert chatty.decode(made.ids[made.start :], skip_special_tokens=True) == "cd"


@pytest.mark.parametrize(("prompt", "response"), [(500, 3), (3, 500), (500, 500), (60, 60)])
def test_a_long_record_keeps_some_of_both(tokenizer: PreTrainedTokenizerBase, prompt: int, response: int) -> None:
    made = encode(Record((("user", "p" * prompt + "?"),), "A" + "r" * response), tokenizer, 64)
    assert len(made.ids) == 64
    assert not made.whole
    assert made.start >= 1
    assert len(made.ids) - made.start >= min(response + 1, 32)
    assert tokenizer.decode(made.ids[: made.start], skip_special_tokens=True).endswith("?\n")
    assert tokenizer.decode(made.ids[made.start :], skip_special_tokens=True).startswith("Ar")
