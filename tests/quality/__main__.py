"""`python -m tests.quality --count 1000`: every planted fault is caught by the right rule, and
little else is lost.

Portraits are synthesised, faults planted among them, and all is made into a data set by
configs/dataset/demo.yaml. Exits 1 unless every planted picture has a right reason and under 1 % of
the others are dropped.
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
    parser.add_argument("--each", type=int, default=20, help="planted pictures of each kind")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality"), help="for portraits, input and output"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    portraits, photos, output = (given.folder / name for name in ("portraits", "photos", "dataset"))
    if len(list(portraits.glob("*.jpg"))) < given.count:
        command = [sys.executable, "-m", "pipelines.cli", "synthesize", str(portraits)]
        subprocess.run(
            [*command, "--count", str(given.count), "--seed", str(given.seed)], check=True
        )
    shutil.rmtree(photos, ignore_errors=True)
    planted = plant(sorted(portraits.glob("*.jpg"))[: given.count], photos, given.each)
    settings = [f"source.path={photos}", f"output={output}", *given.settings]
    run(load(DatasetConfig, "configs/dataset/demo.yaml", settings))
    store = Store(str(output))
    write_report(store)
    rows = [
        row
        for index in DatasetReader(store).manifests()
        for row in DatasetReader(store)
        .rows(index, ["source", "status", "reason", "detail"])
        .to_pylist()
    ]
    print(json.dumps({"planted": len(planted), "inputs": len(rows)}))
    wrong = 0
    for fault in FAULTS:
        found = Counter(
            row["reason"] or "written" for row in rows if planted.get(row["source"]) is fault
        )
        missed = sum(count for reason, count in found.items() if reason not in fault.reasons)
        wrong += missed
        print(f"{fault.name:12} {dict(found)}{'   WRONG' if missed else ''}")
    others = [row for row in rows if row["source"] not in planted]
    lost = [row for row in others if row["status"] != "ok"]
    for row in lost:
        print(f"  lost: {row['source']}  {row['reason']}  {row['detail']}")
    share = len(lost) / len(others)
    print(f"others lost: {len(lost)} of {len(others)} ({share:.2%})")
    faults = list(lint(store))
    print(f"lint: {faults or 'clean'}")
    return int(bool(wrong or share >= 0.01 or faults))


if __name__ == "__main__":
    sys.exit(main())
