"""Prompt templates: text files whose slots are written {{instruction}}.

A value is untrusted text. It is put in once, so a slot name inside it stays literal, and it cannot
open or close a tag of the template nor spell one of its markers, the labels like "RESPONSE A:" in
front of a slot. So an answer that imitates the prompt stays inside its slot.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nemo_selfpref.errors import ConfigError

_SLOT = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_TAG = re.compile(r"<(/?)([A-Za-z][\w-]*)>")
# Markdown's stars count as white space: a model reads "**Response B**:" as the label it is.
_GAP = r"[\s*]"
# A label's colon, full-width and small forms included, and what comes between it and the slot.
_COLON = "[:\uff1a\ufe13\ufe55]"
_BEFORE_SLOT = re.compile(rf"{_COLON}{_GAP}*(?={_SLOT.pattern})")
# A label begins with its line or behind a sentence, another colon, a slot or a tag.
_LABEL_START = re.compile(rf"[\n}}>]|{_COLON}|[.?!]\s")
_GLUED = re.compile(r"(?:[<\w/{-]\{\{\s*\w+\s*\}\})|(?:\{\{\s*\w+\s*\}\}[>\w/}-])|\}\}\{\{")


@dataclass(frozen=True)
class PromptTemplate:
    """A checked template; `slots` are the names that `render` wants, no more and no fewer."""

    name: str
    text: str
    slots: frozenset[str]

    @property
    def fingerprint(self) -> str:
        """sha256 of the text, in hex; changes whenever the prompt does."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @cached_property
    def tags(self) -> frozenset[str]:
        """Names that the template both opens and closes."""
        found = _TAG.findall(self.text)
        opened = {name for slash, name in found if not slash}
        return frozenset(opened & {name for slash, name in found if slash})

    @cached_property
    def markers(self) -> frozenset[str]:
        """Labels that stand in front of a slot and end with a colon, as "RESPONSE A:".

        Empty where the only slot ends the template: no section follows that a value could open, and
        the value (Sr's query) reaches the model as the user wrote it.
        """
        slots = list(_SLOT.finditer(self.text))
        if len(slots) == 1 and slots[0].end() == len(self.text):
            return frozenset()
        labels = (
            _LABEL_START.split(self.text[: colon.start()])[-1]
            for colon in _BEFORE_SLOT.finditer(self.text)
        )
        # "### Query:" and "- Query:" differ in decoration only: a marker begins with a word.
        words = (re.findall(r"[^\s*]+", re.sub(r"^\W+", "", label)) for label in labels)
        return frozenset(" ".join(label) + ":" for label in words if label)

    def render(self, /, **values: str) -> str:
        """The text with every slot replaced by its value.

        Inside a value, a "<" that would start one of the template's tags becomes "&lt;", and the
        colon of one of its markers becomes "&#58;".

        Raises:
            ConfigError: a value is missing, left over or not a string.
        """
        if values.keys() != self.slots:
            missing, extra = self.slots - values.keys(), values.keys() - self.slots
            raise ConfigError(
                f"template {self.name}: missing values {_names(missing)}, values without a slot "
                f"{_names(extra)}; pass exactly {_names(self.slots)}"
            )
        for slot, value in values.items():
            if not isinstance(value, str):
                raise ConfigError(
                    f"template {self.name}: slot {slot} got {type(value).__name__}; pass text"
                )
        safe = {slot: self._neutralise(value) for slot, value in values.items()}
        return _SLOT.sub(lambda match: safe[match[1]], self.text)

    @cached_property
    def _lookalike(self) -> re.Pattern[str]:
        # Wider than an exact tag: a language model also reads "< /Response_B >" as a closing tag.
        names = "|".join(re.escape(name) for name in sorted(self.tags))
        return re.compile(rf"<(?=\s*/?\s*(?:{names})(?![\w-]))", re.IGNORECASE)

    @cached_property
    def _marker(self) -> re.Pattern[str]:
        # Anywhere, not at line starts only: a value may be put in right behind a label.
        labels = "|".join(
            rf"{_GAP}+".join(re.escape(word) for word in marker[:-1].split())
            for marker in sorted(self.markers)
        )
        return re.compile(rf"(?<!\w)((?:{labels}){_GAP}*){_COLON}", re.IGNORECASE)

    def _neutralise(self, value: str) -> str:
        if self.tags:
            value = self._lookalike.sub("&lt;", value)
        return self._marker.sub(r"\1&#58;", value) if self.markers else value


def load_template(
    name_or_path: str,
    required: frozenset[str],
    optional: frozenset[str] = frozenset(),
    folder: Path | None = None,
) -> PromptTemplate:
    """Read and check a template: a path that ends in .txt, or the name of one in `folder`.

    Raises:
        ConfigError: the file is absent, unreadable, not UTF-8 or empty, or a slot is missing,
            unknown, malformed or glued to other text.
    """
    path = _locate(name_or_path, folder)
    text = _read(path)
    slots = frozenset(_SLOT.findall(text))
    _check_slots(path, text, slots, required, optional)
    return PromptTemplate(path.stem, text, slots)


def _locate(name_or_path: str, folder: Path | None) -> Path:
    if name_or_path.endswith(".txt"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ConfigError(f"{path}: no such template file; give the path of a .txt file")
        return path
    files = {file.stem: file for file in folder.glob("*.txt")} if folder else {}
    if name_or_path not in files:
        raise ConfigError(
            f"template {name_or_path!r}: not a name in {folder or 'any folder'}; use one of "
            f"{_names(files)} or the path of a .txt file"
        )
    return files[name_or_path]


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 at byte {error.start}; save the template as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    # The editor's last newline is no part of a prompt, nor are another system's line ends.
    text = raw.replace("\r\n", "\n").strip()
    if not text:
        raise ConfigError(f"{path}: the template is empty; write the prompt into it")
    return text


def _check_slots(
    path: Path, text: str, slots: frozenset[str], required: frozenset[str], optional: frozenset[str]
) -> None:
    allowed = required | optional
    for slot in sorted(required - slots):
        raise ConfigError(f"{path}: slot {{{{{slot}}}}} is missing; write it where its text goes")
    for slot in sorted(slots - allowed):
        raise ConfigError(
            f"{path}: unknown slot {{{{{slot}}}}}; this prompt knows {_names(allowed)}: remove or "
            "rename it"
        )
    rest = _SLOT.sub("", text)
    if "{{" in rest or "}}" in rest:
        raise ConfigError(
            f"{path}: a '{{{{' or '}}}}' that is no slot; write slots as {{{{name}}}}, with one of "
            f"{_names(allowed)}"
        )
    glued = _GLUED.search(text)
    if glued:
        raise ConfigError(
            f"{path}: slot glued to other text at {glued[0]!r}; put each slot on a line of its own "
            "or behind a label's colon, so that its value cannot complete a tag"
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"
