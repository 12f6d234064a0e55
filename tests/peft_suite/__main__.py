"""Run PEFT's own tests, of the installed version, against MoKA.

    python -m tests.peft_suite [--only quantization] [-k EXPRESSION] [--processes 2]

Downloads PEFT's source distribution (which ships its tests) once, unpacks it, makes local stand-ins for the models
that the tests take from a hub, puts MokaConfigs in the place of PEFT's cases (see `plugin.py`), and prints what passed,
failed and was skipped, by file. Exits with 1 if a test failed that is not in `EXPECTED`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
FILES = ("custom_models", "decoder_models", "quantization")

# Tests that cannot pass, by the beginning of their name, with the reason.
EXPECTED: dict[str, str] = {}


def main() -> int:
    """Run the tests; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peft_suite", help="where everything is put")
    parser.add_argument("--only", choices=FILES, action="append", help="a file of tests; all three by default")
    parser.add_argument("-k", dest="expression", help="as pytest's")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()

    folder = arguments.folder / version("peft")
    _unpack(folder)
    from tests.peft_suite.models import make_models

    make_models(folder)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.peft_suite.plugin", "-p", "no:cacheprovider"]
    command += ["-c", str(folder / "pytest.ini"), f"--junitxml={report}", "-n", str(arguments.processes)]
    command += ["-k", arguments.expression] if arguments.expression else []
    command += [f"peft_tests/test_{name}.py" for name in arguments.only or FILES]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env={**os.environ, **settings}, check=False)
    if not report.is_file():
        print("pytest wrote no report: nothing was run", file=sys.stderr)
        return 2
    return _summarise(report)


def _unpack(folder: Path) -> None:
    """PEFT's tests as the package `peft_tests`, and a configuration of pytest that is not PEFT's."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "peft_tests" / "__init__.py").is_file():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        download += ["--no-binary", "peft", "--dest", str(folder), f"peft=={version('peft')}"]
        subprocess.run(download, check=True)
        (archive,) = folder.glob("peft-*.tar.gz")
        with tarfile.open(archive) as opened:
            for member in opened.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    member.name = f"peft_tests/{parts[2]}"
                    opened.extract(member, folder, filter="data")
        (folder / "peft_tests" / "__init__.py").touch()
    markers = ["single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"]
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n" + "".join(f"    {marker}: PEFT's\n" for marker in markers)
    )


def _summarise(report: Path) -> int:
    counts: dict[str, Counter[str]] = {}
    unexpected = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        file = case.get("classname", "").split(".")[1] if "." in case.get("classname", "") else "?"
        failed = kinds & {"failure", "error"}
        reason = next((why for start, why in EXPECTED.items() if name.startswith(start)), None)
        outcome = "skipped" if "skipped" in kinds else "passed" if not failed else "expected" if reason else "failed"
        counts.setdefault(file, Counter())[outcome] += 1
        if outcome == "failed":
            unexpected.append(name)
    table = Table("file", "passed", "failed", "failed as expected", "skipped", title=f"PEFT {version('peft')}'s tests")
    for file, found in sorted(counts.items()):
        table.add_row(file, *(str(found[kind]) for kind in ("passed", "failed", "expected", "skipped")))
    Console().print(table)
    for name in unexpected:
        print(f"failed: {name}")
    return 1 if unexpected or not counts else 0


if __name__ == "__main__":
    sys.exit(main())
