"""A new user's path: from a clone to the HTML report of a pruned model, every step timed.

    python benchmarks/new_user.py [--source REPOSITORY]

Clones into a temporary folder, makes an environment there, prunes the demo model, and writes
benchmarks/results/new_user.json. Packages come from wherever pip takes them; its own cache is not used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(ROOT), help="What to clone; this checkout unless given.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "new_user.json")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="new-user-"))
    clone = home / "compressllm"
    # A user who has never been here: no caches, and nothing of this environment.
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    environment |= {"COMPRESSLLM_CACHE": str(home / "cache"), "PIP_NO_CACHE_DIR": "1"}
    steps: list[dict[str, object]] = []

    def step(what: str, *command: str, shown: str = "") -> None:
        folder = clone if clone.exists() else home
        begun = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True)
        steps.append(
            {"step": what, "command": shown or " ".join(command), "seconds": round(time.perf_counter() - begun, 1)}
        )

    try:
        step("clone", "git", "clone", "--quiet", arguments.source, str(clone), shown="git clone REPOSITORY")
        step("environment", "make", "--silent", ".venv/demo.stamp")
        step("model, pruned, exported, measured, and its report", "make", "--silent", "demo")
        report, manifest = clone / "demo-out" / "report.html", clone / "demo-out" / "manifest.json"
        found = json.loads(manifest.read_text())
        result = {
            "what": "from git clone to the HTML report of SmolLM2-135M-Instruct pruned to 2:4, by make demo",
            "command": "python benchmarks/new_user.py",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": found["environment"],
            "loadavg": os.getloadavg()[1],
            "seconds": round(sum(float(str(one["seconds"])) for one in steps), 1),
            "steps": steps,
            "stages": [{"stage": one["stage"], "seconds": one["seconds"]} for one in found["stages"]],
            "report_bytes": report.stat().st_size,
        }
    finally:
        shutil.rmtree(home, ignore_errors=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
