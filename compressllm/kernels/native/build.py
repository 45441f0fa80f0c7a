"""Compile the C kernels into a shared library in the cache, once for each compiler and version of the sources."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch  # its OpenMP must be in the process before ours is looked for

from compressllm.core.cache import cache_folder
from compressllm.core.errors import BackendUnavailableError
from compressllm.kernels.native.isa import ISAS, isas_here

SOURCES = Path(__file__).parent / "c"
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno")  # not -ffast-math: NaN, infinities and order of sums stand
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
_SECONDS = 300  # for one run of the compiler; a hang is reported, not waited out


@dataclass(frozen=True)
class Build:
    """One compiled library.

    Args:
        library: The shared library.
        compiler: Its path and version.
        isas: The instruction sets in it, lowest first.
        skipped: Instruction set -> why the compiler could not build it.
        openmp: The OpenMP library it shares with torch, or None: then it runs on one thread.
        no_openmp: Why it has none.
        seconds: How long the build took.
    """

    library: Path
    compiler: str
    isas: tuple[str, ...]
    skipped: Mapping[str, str]
    openmp: str | None
    no_openmp: str | None
    seconds: float


def build() -> Build:
    """The library of this machine's compiler, from the cache or compiled now; processes may call it at once.

    Without a compiler, one that was compiled from the same sources before will do.

    Raises: BackendUnavailableError if there is no compiler, or it fails.
    """
    folder = cache_folder() / "native"
    sources = _digest(*(text for path in sorted(SOURCES.iterdir()) for text in (path.name, path.read_text("utf-8"))))
    try:
        compiler = _compiler()
    except BackendUnavailableError:
        if compiled := sorted(folder.glob(f"{sources}-*/build.json")):
            return _read(compiled[0])
        raise
    version = _run([*compiler, "--version"]).splitlines()[0]
    openmp = openmp_in_process()
    machine = (platform.machine(), platform.system())
    folder /= f"{sources}-{_digest(*compiler, version, *_FLAGS, openmp, *machine, ISAS)}"
    if not (folder / "build.json").exists():
        _build_into(folder, compiler, f"{compiler[0]}: {version}", openmp)
    return _read(folder / "build.json")


def _read(record: Path) -> Build:
    facts = json.loads(record.read_text(encoding="utf-8"))
    return Build(**facts | {"library": record.parent / facts["library"], "isas": tuple(facts["isas"])})


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


def openmp_in_process() -> str | None:
    """Path of the OpenMP library that torch has loaded: with any other there would be two pools of threads."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps)
        return torchs_of([path for path in paths if Path(path).name.startswith(_OPENMP_NAMES)])
    return None


def torchs_of(paths: Sequence[str]) -> str | None:
    """Of OpenMP libraries in a process that which is torch's: its own, or the system's; wheels bring others."""
    home = Path(torch.__file__).parent

    def strange(path: str) -> int:
        folder = Path(path).parent
        if folder.is_relative_to(home) or folder == home.with_name("torch.libs"):
            return 0
        return 2 if folder.suffix == ".libs" else 1

    return min(paths, key=strange, default=None)


def _compiler() -> list[str]:
    """The C compiler's command: ``$CC``, or the first of cc, gcc and clang."""
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for command in wanted:
        parts = shlex.split(command)
        if parts and (found := shutil.which(parts[0])):
            return [found, *parts[1:]]
    raise BackendUnavailableError(f"needs a C compiler, found none called {', '.join(wanted)}; install gcc or set CC")


def _build_into(folder: Path, compiler: list[str], name: str, openmp: str | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder.parent) as scratch:
        work = Path(scratch)
        library, no_openmp = work / "kernels.so", "torch has loaded none that could be shared"
        isas: list[str] = []
        skipped: dict[str, str] = {}
        if openmp:
            try:
                isas, skipped = _compile(work, compiler, ("-fopenmp",))
                _link(work, compiler, library, [openmp])
            except BackendUnavailableError as error:
                no_openmp, openmp = str(error), None
        if not openmp:
            isas, skipped = _compile(work, compiler, ())
            _link(work, compiler, library, [])
        built = Build(
            Path(library.name),
            name,
            tuple(isas),
            skipped,
            openmp,
            None if openmp else no_openmp,
            round(time.monotonic() - started, 2),
        )
        for path in work.glob("*.o"):
            path.unlink()
        (work / "build.json").write_text(json.dumps(asdict(built), default=str, indent=2), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was faster; its library is the same
            os.replace(work, folder)
            work.mkdir()  # for TemporaryDirectory to remove
    if not (folder / "build.json").exists():
        raise BackendUnavailableError(f"{folder}: is in the way of the compiled kernels; delete it")


def _compile(work: Path, compiler: list[str], flags: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """One object a source. Returns the instruction sets that compiled, and of the others the compiler's complaint."""
    isas: list[str] = []
    skipped: dict[str, str] = {}
    of_isa = {isa.name: sorted(SOURCES.glob(f"*_{isa.name}.c")) for isa in ISAS}
    common = set(SOURCES.glob("*.c")).difference(*of_isa.values())
    for path in sorted(common):
        _compile_one(work, compiler, path, flags)
    for isa in isas_here():
        try:
            for path in of_isa[isa.name]:
                _compile_one(work, compiler, path, (*flags, *isa.flags))
            if of_isa[isa.name]:
                isas.append(isa.name)
        except BackendUnavailableError as error:
            if isa.name == "scalar":
                raise
            skipped[isa.name] = str(error)
            for path in of_isa[isa.name]:
                (work / f"{path.stem}.o").unlink(missing_ok=True)
    return isas, skipped


def _compile_one(work: Path, compiler: list[str], path: Path, flags: tuple[str, ...]) -> None:
    _run([*compiler, *_FLAGS, *flags, "-c", str(path), "-o", str(work / f"{path.stem}.o")])


def _link(work: Path, compiler: list[str], library: Path, openmp: list[str]) -> None:
    objects = sorted(str(path) for path in work.glob("*.o"))
    _run([*compiler, "-shared", *objects, *openmp, "-lpthread", "-lm", "-o", str(library)])


def _run(command: list[str]) -> str:
    """The command's output. Raises BackendUnavailableError with the first line of its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(f"{command[0]}: cannot be run: {error}") from None
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise BackendUnavailableError(f"{command[0]}: cannot build the kernels: {complaint}")
    return done.stdout
