import json
import os
import stat
import threading

import pytest

from compressllm.core.errors import BackendUnavailableError
from compressllm.kernels.native import build as module
from compressllm.kernels.native.build import build


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """Sources that compile at once; a test may change them. `test_library.py` builds the real ones."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "cpu.c").write_text("int cpu(void) { return 1; }\n")
    for isa in module.ISAS:
        (folder / f"format_{isa.name}.c").write_text(f"int format_tile_{isa.name}(void) {{ return 1; }}\n")
    monkeypatch.setattr(module, "SOURCES", folder)
    return folder


def test_is_built_once(cache, monkeypatch):
    built = build()
    assert built.library.is_relative_to(cache)
    assert "scalar" in built.isas
    assert not list(built.library.parent.glob("*.o"))
    commands = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda command: commands.append(command) or run(command))
    assert build() == built
    assert [command[1:] for command in commands] == [["--version"]]


def test_a_changed_source_is_built_anew(sources):
    before = build()
    (sources / "cpu.c").write_text((sources / "cpu.c").read_text() + "\n")
    assert build().library != before.library


def test_processes_that_build_at_once_share_one(cache):
    results = []
    threads = [threading.Thread(target=lambda: results.append(build())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.library for result in results}) == 1
    assert len(results) == 3
    assert [path.name for path in (cache / "native").iterdir()] == [results[0].library.parent.name]


def test_an_instruction_set_the_compiler_does_not_know_is_left_out(sources):
    isa = module.isas_here()[-1].name
    victim = next(name for name in ("avx512", "neon", isa) if list(sources.glob(f"*_{name}.c")))
    for path in sources.glob(f"*_{victim}.c"):
        path.write_text("#error too old\n")
    built = build()
    assert victim not in built.isas
    assert "too old" in built.skipped[victim]
    assert "scalar" in built.isas


def test_without_openmp_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "openmp_in_process", lambda: None)
    built = build()
    assert built.openmp is None
    assert built.no_openmp == "torch has loaded none that could be shared"


def test_an_openmp_that_does_not_link_is_done_without(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "openmp_in_process", lambda: str(tmp_path / "libgomp.so.1"))
    built = build()
    assert built.openmp is None
    assert "cannot build the kernels" in built.no_openmp


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(BackendUnavailableError, match="needs a C compiler, found none called no-such-compiler"):
        build()


def test_no_compiler_but_a_library_compiled_before(monkeypatch, sources):
    built = build()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build() == built
    (sources / "cpu.c").write_text("")
    with pytest.raises(BackendUnavailableError, match="needs a C compiler"):
        build()


def test_a_compiler_that_fails(monkeypatch, tmp_path, cache):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo broken 1.0 && exit\necho x.c: error: no >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(BackendUnavailableError, match=r"cannot build the kernels: x\.c: error: no"):
        build()
    assert not list((cache / "native").iterdir())


def test_the_record_is_plain_json():
    built = build()
    facts = json.loads((built.library.parent / "build.json").read_text())
    assert facts["library"] == built.library.name
    assert os.path.basename(facts["compiler"].split(":")[0])


def test_torchs_openmp_is_told_from_those_that_other_wheels_bring(monkeypatch):
    monkeypatch.setattr(module.torch, "__file__", "/env/site-packages/torch/__init__.py")
    others = "/env/site-packages/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0"
    system = "/usr/lib/x86_64-linux-gnu/libgomp.so.1"
    for own in ("/env/site-packages/torch/lib/libgomp.so.1", "/env/site-packages/torch.libs/libgomp-a34b3233.so.1"):
        assert module.torchs_of([others, system, own]) == own
    assert module.torchs_of([others, system]) == system  # torch of a distribution
    assert module.torchs_of([]) is None


def test_a_wheel_with_an_openmp_of_its_own_changes_nothing():
    pytest.importorskip("sklearn.cluster")
    found = module.openmp_in_process()
    assert found is None or ".libs" not in found
