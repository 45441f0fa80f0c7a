import importlib
import sys

import pytest

from compressllm.export import autoload


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A stand-in for transformers, and one for our loader that counts its imports."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "__init__.py").write_text("")
    (tmp_path / "host" / "auto.py").write_text('"""The registry."""\nDONE = True\n')
    (tmp_path / "plugin_of_host.py").write_text("import sys\nfrom host.auto import DONE\nsys.plugin_runs += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(autoload, "_WATCHED", "host.auto")
    monkeypatch.setattr(autoload, "_OURS", "plugin_of_host")
    monkeypatch.setattr(sys, "plugin_runs", 0, raising=False)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload._Watcher)])
    yield
    for name in ("host", "host.auto", "plugin_of_host"):
        sys.modules.pop(name, None)


def watchers() -> int:
    return sum(isinstance(finder, autoload._Watcher) for finder in sys.meta_path)


def test_registers_when_the_watched_module_is_imported(plugin):
    autoload.install()
    autoload.install()
    assert watchers() == 1
    importlib.import_module("host")
    assert sys.plugin_runs == 0
    auto = importlib.import_module("host.auto")
    assert auto.DONE
    assert sys.plugin_runs == 1
    assert watchers() == 0


def test_registers_at_once_when_it_is_there_already(plugin):
    importlib.import_module("host.auto")
    autoload.install()
    assert sys.plugin_runs == 1
    assert watchers() == 0


def test_our_module_may_be_what_imports_it(plugin):
    autoload.install()
    importlib.import_module("plugin_of_host")
    assert sys.plugin_runs == 1


def test_looking_for_the_module_is_not_importing_it(plugin):
    autoload.install()
    spec = importlib.util.find_spec("host.auto")
    assert spec is not None
    assert "The registry." in spec.loader.get_source("host.auto")
    assert sys.plugin_runs == 0
    importlib.import_module("host.auto")
    assert sys.plugin_runs == 1


def test_a_missing_module_stays_missing(plugin, monkeypatch):
    monkeypatch.setattr(autoload, "_WATCHED", "host.nothing")
    autoload.install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("host.nothing")
