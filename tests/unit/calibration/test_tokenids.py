import numpy as np
import pytest
import torch

from compressllm.calibration.tokenids import TokenIds
from compressllm.core.errors import CalibrationError


def save(path, array):
    np.save(path, array, allow_pickle=True)
    return TokenIds(path)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, ">i4"])
def test_ids_are_used_exactly_as_given(tmp_path, dtype):
    given = np.arange(12).reshape(3, 4)[:, ::-1]
    ids = save(tmp_path / "a.npy", np.asfortranarray(given.astype(dtype))).read(vocab_size=12)
    assert ids.dtype == torch.int64
    assert ids.is_contiguous()
    assert ids.tolist() == given.tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.int64), r"is int64 \(5,\); token ids are one 2-D integer array"),
        (np.zeros((2, 3, 4), np.int64), "token ids are one 2-D integer array"),
        (np.zeros((2, 3)), r"is float64 \(2, 3\)"),
        (np.zeros((2, 3), bool), r"is bool \(2, 3\)"),
        (np.array([["a", "b"]]), "token ids are one 2-D integer array"),
        (np.array([[{}, {}]], object), "is not a whole .npy file of numbers"),
        (np.zeros((0, 3), np.int64), "is 0 x 3 ids"),
        (np.zeros((3, 1), np.int64), "is 3 x 1 ids"),
        (np.array([[0, -1]]), r"holds token id -1, ids must be 0 to 9; make the file with this model's tokenizer"),
        (np.array([[0, 10]]), "holds token id 10, ids must be 0 to 9"),
        (np.array([[0, 2**63]], np.uint64), "holds token id 9223372036854775808"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, array, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        save(tmp_path / "a.npy", array).read(vocab_size=10)
    assert "\n" not in str(caught.value)


def test_range_is_free_above_without_a_vocabulary(tmp_path):
    assert save(tmp_path / "a.npy", np.array([[0, 99]])).read().tolist() == [[0, 99]]
    with pytest.raises(CalibrationError, match="ids must be 0 or more"):
        save(tmp_path / "b.npy", np.array([[0, -9]])).read()


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"not an array", b"PK\x03\x04 no archive either"])
def test_damaged_files_are_refused(tmp_path, data):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(CalibrationError, match=r"is not a whole \.npy file"):
        TokenIds(tmp_path / "a.npy").read()


def test_truncated_and_archived_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((9, 9), np.int64))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(CalibrationError, match=r"is not a whole \.npy file"):
        TokenIds(tmp_path / "a.npy").read()
    with (tmp_path / "b.npy").open("wb") as file:
        np.savez(file, ids=np.zeros((9, 9), np.int64))
    with pytest.raises(CalibrationError, match="is an archive of arrays"):
        TokenIds(tmp_path / "b.npy").read()


def test_missing_file_and_text(tmp_path):
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        TokenIds(tmp_path / "gone.npy").read()
    with pytest.raises(CalibrationError, match="holds token ids; text is needed here"):
        TokenIds(tmp_path / "gone.npy").texts("calibration")
