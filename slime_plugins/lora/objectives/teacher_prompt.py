"""What a teacher is shown in place of the student's prompt: a template, as it is typed after a flag. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slime_plugins.lora.errors import UsageError

_FIELD = re.compile(r"\\n|\{\{|\}\}|\{([^{}]*)\}|[{}]")
_METADATA = re.compile(r"metadata\[([^\[\]]+)\]")
_TEXT = {"{{": "{", "}}": "}", "\\n": "\n"}
"""What stands for text that a command line, or this form, makes awkward."""
_FLAG = "--gkd-teacher-prompt-template"


class TeacherPrompt:
    """A template of ``{prompt}``, ``{label}``, ``{metadata[KEY]}``; ``{{``, ``}}`` are braces, ``\\n`` a new line."""

    def __init__(self, template: str):
        """Raises UsageError for a field that is none of these, and for a brace that stands alone."""
        self.template = template
        for match in _FIELD.finditer(template):
            name = match.group(1)
            if match.group() in _TEXT or name in ("prompt", "label") or _METADATA.fullmatch(name or ""):
                continue
            raise UsageError(
                f"{_FLAG} {template!r}: {match.group()!r}, expected {{prompt}}, {{label}} or {{metadata[KEY]}} "
                "(braces themselves are written {{ and }})"
            )

    @property
    def tells_more(self) -> bool:
        """Is the teacher shown anything but the prompt?"""
        return self.template.replace("\\n", "\n").strip() != "{prompt}"

    def of(self, prompt: str | list, label: str | None, metadata: Mapping[str, Any]) -> str | list:
        """The teacher's prompt; of chat messages, with the last one's text put through the template.

        Raises:
            ValueError: the line has no such label or metadata, or its last message holds no text.
        """
        if isinstance(prompt, str):
            return self._filled(prompt, label, metadata)
        *before, last = prompt
        if not isinstance(last, Mapping) or not isinstance(last.get("content"), str):
            raise ValueError(f"{_FLAG}: the last message of a prompt is {last!r}, expected one with text as content")
        return [*before, {**last, "content": self._filled(last["content"], label, metadata)}]

    def _filled(self, prompt: str, label: str | None, metadata: Mapping[str, Any]) -> str:
        def value(match: re.Match) -> str:
            if match.group() in _TEXT:
                return _TEXT[match.group()]
            name = match.group(1)
            if name == "prompt":
                return prompt
            key = _METADATA.fullmatch(name)
            found = metadata.get(key.group(1)) if key else label
            if found is None:
                raise ValueError(f"{_FLAG}: there is no {name} for the prompt {prompt[:80]!r}")
            return str(found)

        return _FIELD.sub(value, self.template)
