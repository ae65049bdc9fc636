"""What the rest of the system knows of a tokenizer: text and conversations to token ids and back.

Data can never forge a control token: a row that holds the text "<|im_end|>" is encoded as those
ten characters, while the end-of-turn token the template writes stays a single id.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_selfpref.config.model_schema import TokenizerConfig, TokenizerLibrary
from nemo_selfpref.data.chat import Skeleton, build_skeleton
from nemo_selfpref.errors import DataError
from nemo_selfpref.types import Message, TokenIds


class ChatTokenizer(ABC):
    """A tokenizer with a chat template."""

    vocab_size: int
    eos_id: int
    pad_id: int
    end_of_turn_id: int
    """The token with which an answer ends: the template's, or eos where it writes none."""
    control_ids: frozenset[int]
    """Tokens that only the template may write."""

    _pattern: re.Pattern[str]
    """Finds control tokens in rendered text."""
    _last_prompt: tuple[tuple[tuple[str, str], ...], TokenIds] | None = None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a sampled answer."""
        return frozenset({self.end_of_turn_id, self.eos_id})

    @abstractmethod
    def encode_text(self, text: str) -> TokenIds:
        """Token ids of data; never a control id, whatever the text spells."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> TokenIds:
        """Token ids of a rendered conversation, with no control token but the template's own.

        Raises DataError if the template refuses the conversation.
        """

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of which transformers.AutoTokenizer makes this tokenizer again."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A sha256, in hex, over vocabulary, control tokens and chat template."""

    @abstractmethod
    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text the template makes of a conversation."""

    def _build_skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool) -> Skeleton:
        return build_skeleton(
            lambda messages: self._render(messages, add_generation_prompt), roles, self._pattern
        )

    def encode_prompt(self, messages: Sequence[Message]) -> TokenIds:
        """Token ids of a conversation up to and including the header of the answer to come."""
        key = tuple((message["role"], message["content"]) for message in messages)
        last = self._last_prompt  # once: another thread may put its own there meanwhile
        if last is None or last[0] != key:
            last = (key, self.encode_chat(messages, add_generation_prompt=True))
            self._last_prompt = last
        return last[1]

    def encode_response(self, messages: Sequence[Message], response: str) -> TokenIds:
        """Token ids of an answer to `messages`, the end-of-turn token last.

        encode_prompt(messages) + these ids is the chat rendering up to the end of the answer's
        turn. Where the rendering does not begin with the prompt's ids, the answer is encoded alone.
        """
        prompt = self.encode_prompt(messages)
        turns = [*messages, {"role": "assistant", "content": response}]
        whole = self.encode_chat(turns, add_generation_prompt=False)
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or self.end_of_turn_id not in answer:
            return (*self.encode_text(response), self.end_of_turn_id)
        last = len(answer) - answer[::-1].index(self.end_of_turn_id)
        return answer[:last]


def load_tokenizer(config: TokenizerConfig, default_path: str | None = None) -> ChatTokenizer:
    """Load the tokenizer at config.path, or at `default_path` where the configuration has none.

    A Hugging Face folder or a sentencepiece .model file, from the local disk only. Raises DataError
    for a path that is missing or holds neither, and for a tokenizer without a chat template.
    """
    given = config.path or default_path
    if given is None:
        raise DataError("no tokenizer; got model.tokenizer.path=null; expected a folder or file")
    path = Path(given)
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer; set model.tokenizer.path to a folder or file")
    template = _read_template(config.chat_template)
    model = _sentencepiece_file(path, config.library)
    if model is not None:
        from nemo_selfpref.data.sentencepiece_tokenizer import SentencePieceChatTokenizer

        return SentencePieceChatTokenizer(model, template)
    from nemo_selfpref.data.huggingface_tokenizer import HuggingFaceChatTokenizer

    return HuggingFaceChatTokenizer(path, template)


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: model.tokenizer.chat_template cannot be read: {error}; expected a jinja file"
        ) from error


def _sentencepiece_file(path: Path, library: TokenizerLibrary) -> Path | None:
    if library is TokenizerLibrary.huggingface:
        return None
    models = [path] if path.suffix == ".model" else sorted(path.glob("*.model"))
    has_json = any((path / n).exists() for n in ("tokenizer.json", "tokenizer_config.json"))
    if library is TokenizerLibrary.auto and has_json:
        return None
    if len(models) != 1:
        raise DataError(
            f"{path}: no tokenizer found; got {len(models)} .model files and no tokenizer.json; "
            "expected a Hugging Face tokenizer folder or one sentencepiece .model file; set "
            "model.tokenizer.path and model.tokenizer.library"
        )
    return models[0]


def vocabulary_hash(vocabulary: Mapping[str, int], controls: frozenset[int], template: str) -> str:
    """The fingerprint of a tokenizer: sha256 hex of its vocabulary, control ids and template."""
    tokens = sorted((index, token) for token, index in vocabulary.items())
    text = json.dumps([tokens, sorted(controls), template], ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
