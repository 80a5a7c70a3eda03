"""Pages of the site that are no files in docs/: the README, and the API from the list of public names."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from slime_plugins.lora import _PUBLIC

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add both pages."""
    files.append(File.generated(config, "readme.md", content=_readme()))
    files.append(File.generated(config, "api.md", content=_api()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from docs/ to the README lead to its page here."""
    return markdown.replace("](../README.md", "](readme.md")


def _readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"\[([^]]+)\]\((?!https?:|[\w-]+\.md)[^)]*\)", r"`\1`", text)  # files that are no pages


def _api() -> str:
    parts = [
        "# API\n",
        "Everything that `from slime_plugins.lora import ...` offers. Call what is collective on all ranks.\n",
    ]
    parts += [
        f"## `{name}`\n\n::: slime_plugins.lora.{module}.{name}\n    options: {{heading_level: 3}}\n"
        for name, module in _PUBLIC.items()
    ]
    return "\n".join(parts)
