"""vLLM's and SGLang's own code that reads an adapter's names and config, taken out of their wheels and run.

Both packages need a GPU build of torch to import; the pieces below need nothing. ``SERVERS_DIR`` names a folder with
``vllm/lora`` and ``sglang/srt/lora`` in it; see docs/development.md.
"""

from __future__ import annotations

import ast
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


class Servers:
    """Attributes are the servers' functions and classes."""

    def __init__(self, root: Path) -> None:
        logger = logging.getLogger("vllm")
        vllm = _run(root / "vllm/lora/peft_helper.py", LoRAConfig=None, re=re, init_logger=lambda name: logger)
        self.PEFTHelper = vllm["PEFTHelper"]
        self.parse_fine_tuned_lora_name = _run(root / "vllm/lora/utils.py", ("parse_fine_tuned_lora_name",))[
            "parse_fine_tuned_lora_name"
        ]
        self.LoRAConfig = _run(root / "sglang/srt/lora/lora_config.py")["LoRAConfig"]
        names = ("get_normalized_target_modules", "get_target_module_name")
        sglang = _run(root / "sglang/srt/lora/utils.py", names)
        self.get_normalized_target_modules, self.get_target_module_name = (sglang[name] for name in names)

    @classmethod
    def here(cls) -> Servers:
        """Skips the test where there is none."""
        folder = os.environ.get("SERVERS_DIR")
        if not folder:
            pytest.skip("needs the servers' wheels unpacked: set SERVERS_DIR (docs/development.md)")
        return cls(Path(folder))


def _run(path: Path, only: tuple[str, ...] = (), **names: Any) -> dict[str, Any]:
    """The module's namespace, without what it imports from its own package; of its functions ``only`` these."""
    tree = ast.parse(path.read_text(), str(path))
    own = path.parts[-4 if "srt" in path.parts else -3]
    body = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == own):
            continue
        if isinstance(node, ast.Import) and any(alias.asname and alias.asname in names for alias in node.names):
            continue
        if not only or (isinstance(node, ast.FunctionDef) and node.name in only):
            body.append(node)
    future = ast.parse("from __future__ import annotations").body  # annotations name what has not been imported
    namespace = {"__name__": __name__, "Iterable": Iterable, "Set": set, **names}
    module = ast.Module(body=[*(future if only else []), *body], type_ignores=[])
    exec(compile(module, str(path), "exec"), namespace)
    return namespace
