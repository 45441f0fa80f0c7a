"""CUDA kernels compiled at run time by the compiler that comes with torch (NVRTC), kept in the cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compressllm.core.cache import cache_folder
from compressllm.core.errors import BackendUnavailableError

_FLAGS = ("--std=c++17",)
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernel:
    """A kernel on one GPU.

    Args:
        source: CUDA C file that includes nothing.
        name: Of the kernel in it.
        defines: Macro -> value.
        device: The GPU it is compiled for and loaded on.

    Raises: BackendUnavailableError if there is no NVRTC, or it or the driver refuses.
    """

    def __init__(self, source: Path, name: str, defines: Mapping[str, int], device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        options = (f"--gpu-architecture=sm_{major}{minor}", *_FLAGS, *(f"-D{k}={v}" for k, v in defines.items()))
        self._driver = _driver()
        self._at_once: dict[int, int] = {}
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the module goes into the context that torch has made current
            binary = compiled(source, options)
            self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), binary))
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))

    def at_once(self, threads: int, shared: int) -> int:
        """Blocks of so many threads and bytes of dynamic shared memory that a multiprocessor runs at the same time.

        Has to be called before a launch with more than 48 kB of it. Raises: BackendUnavailableError.
        """
        if shared not in self._at_once:
            if shared > 48 << 10:
                self._check(self._driver.cuFuncSetAttribute(self._function, _DYNAMIC_SHARED, shared))
            found = ctypes.c_int()
            count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
            self._check(count(ctypes.byref(found), self._function, threads, ctypes.c_size_t(shared)))
            self._at_once[shared] = found.value
        return self._at_once[shared]

    def launch(
        self, grid: tuple[int, int], block: tuple[int, int], shared: int, *arguments: Tensor | int | None
    ) -> None:
        """Put a launch on torch's current stream. Tensors go as their addresses, None as a null pointer."""
        values = [
            ctypes.c_int(one) if isinstance(one, int) else ctypes.c_void_p(None if one is None else one.data_ptr())
            for one in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._driver.cuLaunchKernel(self._function, *grid, 1, *block, 1, shared, stream, pointers, None),
        )

    def _check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(text))
            raise BackendUnavailableError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({result})")


def compiled(source: Path, options: Sequence[str]) -> bytes:
    """Machine code of a CUDA C file, from the cache or compiled now."""
    code = source.read_bytes()
    compiler = _compiler()
    digest = hashlib.sha256(b"\0".join((code, *(o.encode() for o in options), _version(compiler)))).hexdigest()[:16]
    path = cache_folder() / "gpu" / f"{source.stem}-{digest}.cubin"
    if path.exists():
        return path.read_bytes()
    binary = _compile(compiler, source.name, code, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # complete or not there
        file.write(binary)
    os.replace(file.name, path)
    return binary


def unavailable() -> str | None:
    """Why nothing can be compiled, or None."""
    try:
        _compiler()
    except BackendUnavailableError as error:
        return str(error)
    return None


@functools.cache
def _compiler() -> ctypes.CDLL:
    major = (torch.version.cuda or "").partition(".")[0]
    if not major:
        raise BackendUnavailableError("needs torch for CUDA; this build has none")
    names = [f"libnvrtc.so.{major}", "libnvrtc.so.11.2"] if major == "11" else [f"libnvrtc.so.{major}"]
    packaged = (p for root in sys.path for name in names for p in Path(root).glob(f"nvidia/*/lib/{name}"))
    for name in (*names, *map(str, packaged)):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendUnavailableError(f"needs {names[0]}, which comes with torch for CUDA; it was not found")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BackendUnavailableError(
            "needs libcuda.so.1, which comes with NVIDIA's driver; it was not found"
        ) from None


def _version(compiler: ctypes.CDLL) -> bytes:
    major, minor = ctypes.c_int(), ctypes.c_int()
    compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}".encode()


def _compile(compiler: ctypes.CDLL, name: str, code: bytes, options: Sequence[str]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    compiler.nvrtcCreateProgram(ctypes.byref(program), code, name.encode(), 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if compiler.nvrtcCompileProgram(program, len(options), given):
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise BackendUnavailableError(f"{name}: NVRTC could not compile it: {log.value.decode().strip()}")
        compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, binary)
        return binary.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
