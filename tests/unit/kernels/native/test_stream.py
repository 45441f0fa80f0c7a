import torch

from compressllm.kernels.native.library import library


def test_reads_every_word_once():
    words = torch.randint(-(2**62), 2**62, (8 * 12345,))  # more than a thread's part, and not a multiple of it
    expected = 0
    for word in words.tolist():
        expected ^= word
    assert library().c.stream_read(words.data_ptr(), words.numel()) == expected % 2**64
