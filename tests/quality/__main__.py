"""Checks the quality rules on planted faults: `python -m tests.quality --count 1000`.

It synthesises portraits, plants faults among them, and makes a data set of all by
configs/dataset/demo.yaml. The exit status is 1 unless every planted image is dropped for a right
reason and less than 1 % of the others are dropped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from configs.load import load
from configs.schema import DatasetConfig
from pipelines.lint import lint
from pipelines.report import write_report
from pipelines.run import run
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.quality.planted import FAULTS, plant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="portraits")
    parser.add_argument("--each", type=int, default=20, help="planted images of each fault")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality"), help="for portraits, input and output"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    portraits, photos, output = (
        options.folder / name for name in ("portraits", "photos", "dataset")
    )
    if len(list(portraits.glob("*.jpg"))) < options.count:
        command = [sys.executable, "-m", "pipelines.cli", "synthesize", str(portraits)]
        subprocess.run(
            [*command, "--count", str(options.count), "--seed", str(options.seed)], check=True
        )
    shutil.rmtree(photos, ignore_errors=True)
    planted = plant(sorted(portraits.glob("*.jpg"))[: options.count], photos, options.each)
    settings = [f"source.path={photos}", f"output={output}", *options.settings]
    run(load(DatasetConfig, "configs/dataset/demo.yaml", settings))
    store = Store(str(output))
    write_report(store)
    reader = DatasetReader(store)
    columns = ["source", "status", "reason", "detail"]
    rows = [row for index in reader.manifests() for row in reader.rows(index, columns).to_pylist()]
    print(json.dumps({"planted": len(planted), "inputs": len(rows)}))
    wrong = 0
    for fault in FAULTS:
        reasons = Counter(
            row["reason"] or "written" for row in rows if planted.get(row["source"]) is fault
        )
        missed = sum(count for reason, count in reasons.items() if reason not in fault.reasons)
        wrong += missed
        print(f"{fault.name:12} {dict(reasons)}{'   WRONG' if missed else ''}")
    others = [row for row in rows if row["source"] not in planted]
    dropped = [row for row in others if row["status"] != "ok"]
    for row in dropped:
        print(f"  dropped: {row['source']}  {row['reason']}  {row['detail']}")
    share = len(dropped) / len(others)
    print(f"others dropped: {len(dropped)} of {len(others)} ({share:.2%})")
    faults = list(lint(store))
    print(f"lint: {faults or 'clean'}")
    return int(bool(wrong or share >= 0.01 or faults))


if __name__ == "__main__":
    sys.exit(main())
