"""Puts what lies outside of docs/ into the site, and points the links at it, for mkdocs (`make docs`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
START = "README.md"  # is the site's first page
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "conversion/FORMAT.md", "benchmarks/README.md")
OTHERS = ("LICENSE", "examples/*.py", "examples/*.ipynb", "moka_core/execution.py", "benchmarks/results/*.json")


def on_files(files: Files, config: Any) -> Files:
    """Add them under the paths that they have in the repository."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / START)))
    for pattern in (*PAGES, "benchmarks/results/*.md", *OTHERS):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to the repository, and from the repository to docs/, as the site has them."""
    if page.file.src_uri == "index.md":
        return markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    if page.file.generated_by is not None:
        return markdown.replace("](../docs/", "](../").replace("](docs/", "](" + up)
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
