"""Tokenizers in Hugging Face folders.

A conversation is encoded as transformers does it, the rendered text as a whole. If that yields
other control tokens than the template wrote, the data spells some out: then the conversation is
encoded once more by a copy of the tokenizer, the shield, in which every control token has a name
that data cannot guess.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_selfpref.data.chat import (
    Control,
    control_pattern,
    roles_of,
    safe_pieces,
    template_error,
)
from nemo_selfpref.data.tokenizer import ChatTokenizer, vocabulary_hash
from nemo_selfpref.errors import DataError
from nemo_selfpref.types import Message, TokenIds

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class HuggingFaceChatTokenizer(ChatTokenizer):
    """A tokenizer of the `tokenizers` library with a chat template.

    Raises DataError if the folder holds none, or it has no chat template or no end token.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        self._tokenizer = _load(folder)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._template = _chat_template(self._tokenizer, folder)
        self._vocabulary: Mapping[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(self._vocabulary.values()) + 1
        self._skeleton = lru_cache(maxsize=256)(self._build_skeleton)
        self._find_controls()
        names = {token: self._vocabulary[token] for token in self._guarded}
        self._shield = _Shield(self._tokenizer.backend_tokenizer, names)
        self._find_ends(folder)

    def _find_controls(self) -> None:
        added = self._tokenizer.added_tokens_decoder
        tokens = {token.content for token in added.values() if not token.content.isspace()}
        self._pattern = control_pattern(tokens)
        # Some tokenizers forgot to mark the tokens of their own template as special.
        user, answer = (
            self._skeleton(("user",), False),
            self._skeleton(("user", "assistant"), False),
        )
        self._end_of_turn = answer.control_after(1)
        special = {token.content for token in added.values() if token.special}
        self._guarded = special | {*user.controls, *filter(None, [self._end_of_turn])}
        self._pattern = control_pattern(self._guarded)
        self._skeleton.cache_clear()
        # Text outside the vocabulary may rightly become the unknown token.
        ends = {self._tokenizer.bos_token, self._tokenizer.eos_token, *answer.controls}
        unknown = {self._tokenizer.unk_token} - ends
        self.control_ids = frozenset(self._vocabulary[t] for t in self._guarded - unknown)
        self._guarded_ids = frozenset(self._vocabulary[token] for token in self._guarded)

    def _find_ends(self, folder: Path) -> None:
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        turn = None if self._end_of_turn is None else self._vocabulary[self._end_of_turn]
        end = turn if eos is None else eos
        if end is None:
            raise DataError(
                f"{folder}: the tokenizer cannot end an answer; got no eos_token and no special "
                "token after an answer in the chat template; expected one; set eos_token in "
                "tokenizer_config.json"
            )
        self.eos_id = end
        self.end_of_turn_id = self.eos_id if turn is None else turn
        self.pad_id = self.eos_id if pad is None else pad

    def encode_text(self, text: str) -> TokenIds:
        ids = self._shield.encode([text])
        if not self.control_ids.isdisjoint(ids):
            raise DataError(f"the tokenizer turns the text {text[:80]!r} into control tokens")
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> TokenIds:
        rendered = self._render(messages, add_generation_prompt)
        encoding = self._tokenizer(rendered, add_special_tokens=False, verbose=False)
        ids = tuple(encoding["input_ids"])
        skeleton = self._skeleton(roles_of(messages), add_generation_prompt)
        expected = tuple(self._vocabulary[token] for token in skeleton.controls)
        if tuple(i for i in ids if i in self._guarded_ids) == expected:
            return ids
        # Built anew, because a template may write the date.
        skeleton = self._build_skeleton(roles_of(messages), add_generation_prompt)
        ids = self._shield.encode(safe_pieces(skeleton, messages, rendered, self._pattern))
        controls = tuple(token for token in expected if token in self.control_ids)
        found = tuple(i for i in ids if i in self.control_ids)
        if found != controls:
            raise DataError(
                f"the messages change the control tokens of the conversation; got {found}; "
                f"expected {controls}; remove spelled-out control tokens from the messages"
            )
        return ids

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise template_error(error, messages) from error

    def save_pretrained(self, folder: str | Path) -> None:
        save_portable(self._tokenizer, Path(folder))

    def fingerprint(self) -> str:
        return vocabulary_hash(self._vocabulary, self.control_ids, self._template)


class _Shield:
    """A tokenizer with the same ids in which control tokens have secret names."""

    def __init__(self, tokenizer: Tokenizer, controls: Mapping[str, int]) -> None:
        from tokenizers import Tokenizer

        secret = secrets.token_hex(8)
        self._names = {token: f"\ue000{secret}{index}\ue001" for token, index in controls.items()}
        self._tokenizer = Tokenizer.from_str(json.dumps(_renamed(tokenizer.to_str(), self._names)))
        for token, index in controls.items():
            if self._tokenizer.token_to_id(self._names[token]) != index:
                raise DataError(f"cannot guard the token {token!r} of this tokenizer against data")

    def encode(self, pieces: Sequence[str | Control]) -> TokenIds:
        names = (self._names[p.token] if isinstance(p, Control) else p for p in pieces)
        return tuple(self._tokenizer.encode("".join(names), add_special_tokens=False).ids)


def _renamed(serialized: str, names: Mapping[str, str]) -> dict[str, Any]:
    spec = json.loads(serialized)
    spec["post_processor"] = spec["padding"] = spec["truncation"] = None
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [
            merge
            for merge in model["merges"]
            if names.keys().isdisjoint([*_parts(merge), "".join(_parts(merge))])
        ]
    return spec


def _parts(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a bad file
        raise DataError(
            f"{folder}: not a Hugging Face tokenizer folder: {error}; expected tokenizer.json and "
            "tokenizer_config.json; set model.tokenizer.path"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"{folder}: got the tokenizer class {type(tokenizer).__name__}; expected a fast one, "
            "with tokenizer.json; convert it with transformers first"
        )
    return tokenizer


def _chat_template(tokenizer: Any, folder: Path) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"{folder}: the tokenizer has no chat template; got none beside it; expected a jinja "
            "file; set model.tokenizer.chat_template"
        ) from error


def save_portable(tokenizer: Any, folder: Path) -> None:
    """Save a transformers tokenizer so that transformers 4 and 5 load it."""
    tokenizer.save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    # Names that transformers 5 writes and 4 does not know; both know the other ones.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    # Two say only how this process found its files; the third names code that the folder it came
    # from would have others import, and which is not here.
    for key in ("is_local", "local_files_only", "auto_map"):
        settings.pop(key, None)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    config.write_text(text + "\n", encoding="utf-8")
