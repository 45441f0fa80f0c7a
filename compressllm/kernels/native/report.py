"""What of the native kernels runs on this machine, and why the rest does not."""

from __future__ import annotations

from typing import Any

import torch

from compressllm.core.cache import cache_folder
from compressllm.core.errors import BackendUnavailableError
from compressllm.core.protocols import BACKENDS
from compressllm.kernels.native import pages
from compressllm.kernels.native.library import SAMPLES, library, shares_threads


def report() -> dict[str, Any]:
    """Plain data: compiler, library, instruction sets, threads, pages. Builds the library if need be."""
    probe = pages.zeros((2 * pages.HUGE_PAGE,), torch.uint8)
    probe.fill_(1)  # pages are given out when they are written to
    facts: dict[str, Any] = {
        "available": False,
        "reason": None,
        "cache": str(cache_folder() / "native"),
        "huge_pages": pages.huge_bytes(probe) > 0,
    }
    try:
        loaded = library()
    except BackendUnavailableError as error:
        return facts | {"reason": str(error)}
    BACKENDS.names()  # imports the backends, whose formats then have their samples
    return facts | {
        "available": True,
        "compiler": loaded.build.compiler,
        "library": str(loaded.build.library),
        "build_seconds": loaded.build.seconds,
        "built": list(loaded.build.isas),
        "usable": list(loaded.isas),
        "chosen": {format: loaded.kernel(format).isa for format in sorted(SAMPLES)},
        "refused": dict(loaded.refused),
        "openmp": loaded.build.openmp,
        "no_openmp": loaded.build.no_openmp,
        "shares_threads_with_torch": shares_threads(loaded),
        "threads": loaded.c.threads(),
    }
