"""Damage checkpoints, text files and recipes, read them, and hold that each ends well or in one line.

    python benchmarks/fuzz.py --count 12000

Case n is damaged by a generator seeded with n, so that one case can be run again: ``--only n``.
"""

from __future__ import annotations

import argparse
import filecmp
import gc
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fuzz_inputs import FOREIGN, make_inputs
from fuzz_mutations import mutate
from fuzz_watch import Watch, bounded

from compressllm.calibration.source import open_source
from compressllm.calibration.tokenids import TokenIds
from compressllm.core.errors import CompressError
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.compressedtensors import BitmaskCheckpoint
from compressllm.models.loading import load_model, load_tokenizer
from compressllm.models.seal import SUMS_NAME
from compressllm.models.survey import damaged_files, survey
from compressllm.recover.records import RecordConfig, Tally
from compressllm.recover.records import read_records as read_answers
from compressllm.select.records import read_records
from compressllm.stages.environment import PeakMemory, environment, resident_bytes
from compressllm.stages.recipe import read_recipe

RESULT = Path(__file__).parent / "results" / "fuzz.json"
SECONDS, MORE_BYTES = 20.0, 1 << 30  # a case may take; reading a few kilobytes needs neither
AT_ONCE = 250  # cases between two writes of the file


def read(path: Path) -> str:
    """Read an input the way commands do: ``well``, or ``told`` if what is wrong was found and said."""
    if path.is_dir():
        checkpoint = BitmaskCheckpoint(path) if path.name == FOREIGN else Checkpoint(path)
        rows = list(survey(checkpoint)[1])  # inspect
        wrong = [row for row in rows if not row.sound] + damaged_files(checkpoint)  # verify
        load_model(checkpoint)
        load_tokenizer(checkpoint)
        return "told" if wrong else "well"
    if path.suffix == ".yaml":
        read_recipe(path).to_yaml()
    elif path.name.startswith("records"):
        read_records(path)
        for _ in read_answers(path, RecordConfig(), Tally()):
            pass
    else:
        source = open_source(str(path))
        if isinstance(source, TokenIds):
            source.read(vocab_size=64)
        else:
            for _ in source.texts("calibration"):
                pass
    return "well"


class Fuzzer:
    """Good inputs in a scratch folder, and what became of damaged copies of them.

    Args:
        folder: Empty; holds a file ``outside`` beside the damaged copy, that nothing may read or change.
        more_bytes: Address space that reading an input may add; None sets no limit.
    """

    def __init__(self, folder: Path, more_bytes: int | None = MORE_BYTES) -> None:
        (folder / "good").mkdir()
        self.inputs = make_inputs(folder / "good")
        self._work, self._more_bytes, self._watch = folder / "work", more_bytes, Watch()
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in self.inputs}
        self.failures: list[dict[str, Any]] = []

    def run(self, case: int) -> None:
        """One case."""
        chance = random.Random(case)
        name = sorted(self.inputs)[case % len(self.inputs)]
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        for suffix in (".safetensors", ".json", ""):
            (self._work / f"outside{suffix}").write_text("{}")
        good, path = self.inputs[name], self._work / self.inputs[name].name
        if good.is_dir():
            shutil.copytree(good, path)
            targets = sorted(path.iterdir())
            weights = [one for one in targets if one.suffix == ".safetensors"]
            how = [mutate(chance.choice(targets + 2 * weights), chance)]
        else:
            shutil.copyfile(good, path)
            how = [mutate(path, chance)]
        outcome, seen = self._read(path)
        changed = good.is_dir() and (good / SUMS_NAME).exists() and _changed(good, path)
        if outcome == "well" and changed:
            outcome = f"was changed ({changed}), and nobody noticed"
        if seen:
            outcome = "; ".join(seen)
        if outcome in {"well", "told", "refused"}:
            self.counts[name][outcome] += 1
        else:
            self.counts[name]["failed"] += 1
            self.failures.append({"case": case, "input": name, "how": how, "what": outcome})

    def _read(self, path: Path) -> tuple[str, list[str]]:
        folder = path if path.is_dir() else path.parent
        with bounded(SECONDS, self._more_bytes), self._watch.on(folder) as seen:
            try:
                return read(path), seen
            except CompressError as error:
                if "allocate" in str(error):
                    return f"asked for too much memory: {error}", seen
                lines = len(str(error).splitlines())
                recipe = path.suffix == ".yaml"  # has a line for each mistake
                return ("refused" if lines == 1 or recipe else f"{lines} lines: {error}"), seen
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                trace = traceback.extract_tb(error.__traceback__)
                ours = [f"{Path(one.filename).name}:{one.lineno}" for one in trace if "compressllm" in one.filename]
                return f"{type(error).__name__}: {str(error)[:300]} (at {' '.join(ours[-3:])})", seen


def _changed(good: Path, path: Path) -> str | None:
    """The first file of a folder that is not as it was; that hashes are gone is not told from an old folder."""
    for one in sorted(good.iterdir()):
        there = path / one.name
        if one.name == SUMS_NAME and not there.exists():
            continue
        if not there.is_file() or not filecmp.cmp(one, there, shallow=False):
            return one.name
    return None


def fuzz(cases: Iterable[int], folder: Path, more_bytes: int | None = MORE_BYTES) -> Fuzzer:
    """Run cases, and give what came of them."""
    fuzzer = Fuzzer(folder, more_bytes)
    for case in cases:
        fuzzer.run(case)
    return fuzzer


def go_on(count: int, out: Path) -> dict[str, Any]:
    """Run the cases up to ``count`` that the file has not counted yet, and keep it up to date; what it says then."""
    record: dict[str, Any] = {"cases": 0, "by_input": {}, "failures": [], "seconds": 0.0, "peak_bytes_added": 0}
    if out.exists():
        record = json.loads(out.read_text())
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        fuzzer.counts = {name: Counter(record["by_input"].get(name, {})) for name in fuzzer.inputs}
        fuzzer.failures = record["failures"]
        while record["cases"] < count:
            memory, held, begun = PeakMemory(), resident_bytes(), time.perf_counter()
            until = min(count, record["cases"] + AT_ONCE)
            for case in range(record["cases"], until):
                fuzzer.run(case)
            gc.collect()
            record |= {
                "what": "damaged inputs, and whether reading them went well, told what is wrong, or was refused",
                "command": f"python benchmarks/fuzz.py --count {until}",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "environment": environment(),
                "cases": until,
                "outcomes": sum(fuzzer.counts.values(), Counter()),
                "by_input": fuzzer.counts,
                "failures": fuzzer.failures,
                "peak_bytes_added": max(record["peak_bytes_added"], memory.bytes() - held),
                "address_space_added_at_most": MORE_BYTES,
                "seconds": round(record["seconds"] + time.perf_counter() - begun, 1),
            }
            out.write_text(json.dumps(record, indent=2) + "\n")
            print(f"{until} cases, {len(fuzzer.failures)} failed", file=sys.stderr, flush=True)
    return record


def main() -> int:
    """Run what is asked for. 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12_000, help="cases in the file when it is done; goes on with it")
    parser.add_argument("--only", type=int, help="one case, and what came of it")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.only is None:
        record = go_on(options.count, options.out)
        print(json.dumps({"outcomes": record["outcomes"], "failures": record["failures"]}, indent=2))
        return 1 if record["failures"] else 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = fuzz([options.only], Path(folder))
    print(json.dumps(fuzzer.failures, indent=2))
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
