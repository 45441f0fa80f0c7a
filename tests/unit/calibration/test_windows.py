import gzip
import hashlib
import json
import logging

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compressllm.calibration.builtin import Builtin
from compressllm.calibration.windows import Windows, evaluation_windows, load_windows
from compressllm.core.errors import CalibrationError, RecipeError

ROWS = ["", " = Title = \n", "", " Some text with an é . \n"] * 8


@pytest.fixture
def tokenizer():
    """One token a byte, BOS first by default; every text of more than 16 tokens is too long for its model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=16, verbose=True
    )


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()))
    return str(path)


@pytest.fixture
def ids(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(30).reshape(3, 10))
    return str(tmp_path / "ids.npy")


def test_evaluation_is_the_joined_rows_with_one_bos(tokenizer, rows):
    windows = evaluation_windows(rows, tokenizer, seqlen=16)
    text = "\n\n".join(ROWS)
    count = (len(text.encode()) + 1) // 16
    assert windows.ids.shape == (count, 16)
    assert text.startswith(tokenizer.decode(windows.ids.flatten()[1:]).rstrip("�"))
    assert windows.ids[0, 0] == 0
    assert (windows.ids == 0).sum() == 1
    assert windows.text_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (windows.protocol, windows.special_tokens, windows.available) == ("stream", "<s>", count)
    assert windows.rule == (
        f"{rows}, {count} windows of 16 tokens, end to end, "
        "texts joined by two newlines and tokenised once, special tokens <s>"
    )


def test_raw_file_and_its_rows_are_different_texts(tokenizer, rows, tmp_path):
    raw = tmp_path / "raw.txt.gz"
    raw.write_bytes(gzip.compress("".join(row or "\n" for row in ROWS).encode()))
    one, other = (evaluation_windows(str(source), tokenizer, seqlen=16) for source in (rows, raw))
    assert one.text_sha256 != other.text_sha256
    assert len(one) > len(other) > 0


def test_limit_takes_the_first_windows_and_tells(tokenizer, rows):
    every, some = evaluation_windows(rows, tokenizer, 16), evaluation_windows(rows, tokenizer, 16, limit=3)
    assert torch.equal(some.ids, every.ids[:3])
    assert some.ids.untyped_storage().nbytes() == 3 * 16 * 8  # the rest is let go
    assert f"first 3 of {len(every)} windows" in some.rule
    assert some.text_sha256 == every.text_sha256
    assert some.sha256 != every.sha256
    assert len(evaluation_windows(rows, tokenizer, 16, limit=10_000)) == len(every)


def test_calibration_is_crops_of_long_documents(tokenizer, tmp_path):
    texts = [chr(ord("a") + index) * 40 for index in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    windows = load_windows(str(tmp_path / "a.jsonl"), tokenizer, samples=8, seqlen=16, seed=3)
    assert (windows.protocol, windows.note, len(windows), windows.seqlen) == ("crops", None, 8, 16)
    assert len({tuple(window[1:].tolist()) for window in windows.ids}) == 8
    assert windows.text_sha256 == hashlib.sha256("\n\n".join(texts).encode()).hexdigest()
    again = load_windows(str(tmp_path / "a.jsonl"), tokenizer, samples=8, seqlen=16, seed=3)
    assert again.sha256 == windows.sha256
    assert load_windows(str(tmp_path / "a.jsonl"), tokenizer, samples=8, seqlen=16, seed=4).sha256 != windows.sha256


def test_builtin_has_windows_for_both(tokenizer):
    calibration = load_windows("builtin", tokenizer, samples=64, seqlen=512)
    evaluation = evaluation_windows("builtin", tokenizer, seqlen=512, limit=64)
    assert len(calibration) == len(evaluation) == 64
    assert calibration.protocol == "packed"
    assert "builtin: " in calibration.note
    assert calibration.text_sha256 != evaluation.text_sha256
    assert evaluation.text_sha256 == hashlib.sha256("\n\n".join(Builtin().texts("evaluation")).encode()).hexdigest()


def test_defaults_stay_within_the_model(tokenizer):
    assert load_windows("builtin", tokenizer).ids.shape == (128, 2048)
    assert load_windows("builtin", tokenizer, max_seqlen=64).ids.shape == (128, 64)
    assert load_windows("builtin", tokenizer, samples=2, max_seqlen=9999).ids.shape == (2, 2048)
    assert evaluation_windows("builtin", tokenizer).seqlen == 1024
    assert evaluation_windows("builtin", tokenizer, max_seqlen=64).seqlen == 64


def test_given_ids_are_used_exactly(ids):
    for windows in (load_windows(ids, None), load_windows(ids, None, 3, 10, 7), evaluation_windows(ids, None, 10)):
        assert windows.ids.tolist() == np.arange(30).reshape(3, 10).tolist()
        assert (windows.protocol, windows.text_sha256, windows.rule) == (
            "given",
            None,
            f"{ids}, 3 windows of 10 tokens, token ids as given",
        )
    assert evaluation_windows(ids, None, limit=2).ids.tolist() == np.arange(20).reshape(2, 10).tolist()
    assert "first 2 of 3 windows" in evaluation_windows(ids, None, limit=2).rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2}, "holds 3 windows, samples says 2; leave samples out"),
        ({"samples": 4}, "holds 3 windows, samples says 4"),
        ({"seqlen": 8}, "holds windows of 10 tokens, seqlen says 8; leave seqlen out"),
        ({"max_seqlen": 8}, "holds windows of 10 tokens, the model takes at most 8"),
        ({"vocab_size": 29}, "holds token id 29, ids must be 0 to 28"),
    ],
)
def test_options_that_contradict_given_ids(ids, options, message):
    with pytest.raises(CalibrationError, match=message):
        load_windows(ids, None, **options)


@pytest.mark.parametrize("load", [load_windows, evaluation_windows])
def test_bad_options_and_sources(load, tokenizer, tmp_path):
    with pytest.raises(RecipeError, match="got 0 windows; at least 1"):
        load("builtin", tokenizer, **{"samples" if load is load_windows else "limit": 0})
    with pytest.raises(RecipeError, match="got seqlen 1; at least 2"):
        load("builtin", tokenizer, seqlen=1)
    with pytest.raises(RecipeError, match="did you mean 'builtin'"):
        load("buildin", tokenizer)
    with pytest.raises(CalibrationError, match="seqlen 65 is more than the 64 tokens that the model takes"):
        load("builtin", tokenizer, seqlen=65, max_seqlen=64)
    with pytest.raises(CalibrationError, match="builtin: the model has no tokenizer; give windows of token ids"):
        load("builtin", None)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(CalibrationError, match=r"short\.txt: comes to 6 tokens, one window needs 16"):
        load(str(tmp_path / "short.txt"), tokenizer, seqlen=16)


def test_hash_is_of_the_ids_and_their_shape():
    ids = torch.arange(6)
    hashes = [Windows(view, "s", "given").sha256 for view in (ids.view(2, 3), ids.view(3, 2), ids.flip(0).view(2, 3))]
    assert len(set(hashes)) == 3
    by_hand = hashlib.sha256(b"2 3\n" + b"".join(i.to_bytes(8, "little") for i in range(6))).hexdigest()
    assert hashes[0] == by_hand
    assert Windows(ids.view(3, 2).T, "s", "given").sha256 == Windows(ids.view(3, 2).T.contiguous(), "s", "given").sha256


def test_facts_can_be_stored(tokenizer):
    windows = load_windows({"builtin": {}}, tokenizer, samples=2, seqlen=16)
    facts = json.loads(json.dumps(windows.facts()))
    assert (facts["source"], facts["windows"], facts["seqlen"]) == ("builtin", 2, 16)
    assert facts["ids_sha256"] == windows.sha256


def test_long_texts_are_no_cause_for_warnings(tokenizer, rows, caplog):
    caplog.set_level(logging.WARNING, logger="transformers")
    logging.getLogger("transformers").addHandler(caplog.handler)  # it does not propagate to the root's
    try:
        evaluation_windows(rows, tokenizer, seqlen=16)
        load_windows(rows, tokenizer, samples=2, seqlen=16)
        assert not caplog.records
        tokenizer("longer than sixteen tokens")
        assert "longer than" in caplog.text
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
