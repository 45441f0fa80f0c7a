import pytest

from compressllm.core.protocols import BACKENDS


@pytest.fixture
def plain_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backends that run on any machine, however many there are by now."""
    known = {name: BACKENDS.get(name) for name in ("dense", "reference")}
    assert set(BACKENDS.names()) >= known.keys()
    monkeypatch.setattr(BACKENDS, "_entries", known)
