"""Install the built wheel into fresh environments, one for each extra, and use it there; nothing of the clone is seen.

    python -m tests.wheel_suite [--only jax] [--folder build/wheel_suite]

In the first, JAX's side trains a small LLaMA and exports it without PyTorch; in the second PyTorch's side takes that
adapter without JAX; in the third both are compared, and the demo runs. Needs the package registry, about 6 GB of disk
and some minutes. Exits with 1 at the first command that does not end as it should.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from rich.console import Console

from moka_cli.demo_base import PACKAGE, VERSION

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch>=2.8,<2.14"

# What is run in each environment, in this order: code for its Python, or arguments of its `moka`.
JAX = [
    "import importlib.util as i; assert not i.find_spec('torch') and not i.find_spec('peft')",
    "import moka_jax, moka_jax.llama, moka_jax.train, conversion.parity",
    ["train", "run.yaml"],
    ["export", "out", "adapter"],
    ["parity", "adapter", "--base", "base", "--backend", "jax", "--quick"],
    ["report", "out"],
    ["generate", "--base", "base", "--adapter", "adapter", "--prompt", "add 3 3", "--max-new-tokens", "4"],
    ["inspect", "adapter"],
    ["params", "--arch", "llama3-8b"],
]
TORCH_SIDE = [
    "import importlib.util as i; assert not i.find_spec('jax') and not i.find_spec('flax')",
    "import moka_torch, conversion.parity",
    ["inspect", "adapter"],
    ["parity", "adapter", "--base", "base", "--backend", "torch", "--quick"],
    ["merge", "adapter", "merged", "--base", "base"],
    ["lora", "adapter", "lora", "--rank", "4", "--base", "base"],
    "import torch; from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('merged').dtype)",
]
ALL = [
    ["parity", "adapter", "--base", "base", "--train", "2"],
    ["demo", "--steps", "2", "--output", "demo"],
    "from pathlib import Path; assert 'Parity' in Path('demo/report.html').read_text()",
]
SUITES = {"jax": JAX, "torch": TORCH_SIDE, "all": ALL}


def main() -> None:
    """Build, install and run; a failure ends the process with its command's output above it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "wheel_suite", help="where everything is put")
    parser.add_argument("--only", choices=SUITES, action="append", help="an environment; all three by default")
    arguments = parser.parse_args()
    folder, console = arguments.folder.resolve(), Console()
    work, dist = folder / "work", folder / "dist"
    for stale in (work, dist):
        shutil.rmtree(stale, ignore_errors=True)
    work.mkdir(parents=True)
    run([sys.executable, "-m", "build", "--outdir", dist, ROOT], ROOT, console)
    (wheel,) = dist.glob("*.whl")
    (_,) = dist.glob("*.tar.gz")
    prepare(work)
    for name in arguments.only or SUITES:
        console.rule(name, align="left")
        home = folder / name
        install(home, wheel, name, console)
        for step in SUITES[name]:
            program = [home / "bin" / "python", "-c", step] if isinstance(step, str) else [home / "bin" / "moka", *step]
            run(program, work, console)
    console.print(f"[green]installed and used: {', '.join(arguments.only or SUITES)}[/green]")


def prepare(work: Path) -> None:
    """A small model, examples and a config, which the environments share."""
    from tests.moka_jax.train_toys import make_tokenizer
    from tests.tiny import save_tiny_llama, write_run

    save_tiny_llama(work / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(work / "base")
    write_run(
        work, Path("base"), train=24, eval=5, steps=4, batch_size=4, eval_every=2, checkpoint_every=2, output="out"
    )


def install(home: Path, wheel: Path, extra: str, console: Console) -> None:
    """A fresh environment that holds the wheel with an extra, in the versions that were tested."""
    venv.create(home, clear=True, with_pip=True)
    pip = [home / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    if extra != "jax":  # first by itself, as in the Makefile: newer ones bring CUDA
        run([*pip, TORCH], home, console)
    run([*pip, f"moka[{extra}] @ {wheel.as_uri()}"], home, console)
    if extra == "all":
        run([*pip, "--no-deps", f"{PACKAGE}=={VERSION}"], home, console)


def run(command: list[str | Path], where: Path, console: Console) -> None:
    """Run a command in a folder, without what would lead it back to the clone."""
    console.print("$ " + " ".join(map(str, command[:1] and [Path(command[0]).name, *command[1:]])), markup=False)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(list(map(str, command)), cwd=where, env=kept, capture_output=True, text=True)
    if ended.returncode:
        console.print(ended.stdout + ended.stderr, markup=False, highlight=False)
        raise SystemExit(f"wheel_suite: expected status 0; got {ended.returncode} from the command above")


if __name__ == "__main__":
    main()
