"""Tokenizers in sentencepiece .model files, and how to train one.

Sentencepiece itself never reads a control piece out of text, so a conversation is cut at the
template's control tokens and the text between them is encoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemo_selfpref.data.chat import (
    Control,
    control_pattern,
    roles_of,
    safe_pieces,
    template_error,
)
from nemo_selfpref.data.sentencepiece_export import PieceKind, export_sentencepiece, read_model
from nemo_selfpref.data.tokenizer import ChatTokenizer, vocabulary_hash
from nemo_selfpref.errors import DataError
from nemo_selfpref.types import Message, TokenIds

CONTROL_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""The control pieces of tokenizers trained here, which the default chat template uses."""

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class SentencePieceChatTokenizer(ChatTokenizer):
    """A sentencepiece model with a chat template.

    Raises DataError if the file is no sentencepiece model, lacks an end token, or lacks the control
    pieces of the default chat template where no other is given.
    """

    def __init__(self, path: Path, chat_template: str | None = None) -> None:
        self._proto = read_model(path)
        self._template = chat_template or _default_template(self._pieces(), path)
        self._skeleton = lru_cache(maxsize=256)(self._build_skeleton)
        self._compiled = _compile(self._template, path)
        self._find_controls()
        self._model = _processor(self._proto)
        self.vocab_size = self._model.get_piece_size()
        self._find_ends(path)

    def _pieces(self, *kinds: PieceKind) -> dict[str, int]:
        """The vocabulary, or its pieces of some kinds."""
        pieces = enumerate(self._proto.pieces)
        return {p.piece: i for i, p in pieces if not kinds or PieceKind(p.type) in kinds}

    def _find_controls(self) -> None:
        self._pattern = control_pattern(self._pieces(PieceKind.CONTROL, PieceKind.USER_DEFINED))
        # Sentencepiece reads user-defined pieces out of text; those that the template uses as
        # control tokens become control pieces, which it does not read.
        user, answer = (
            self._skeleton(("user",), False),
            self._skeleton(("user", "assistant"), False),
        )
        self._end_of_turn = answer.control_after(1)
        for piece in self._proto.pieces:
            if piece.piece in {*user.controls, self._end_of_turn}:
                piece.type = PieceKind.CONTROL
        controls = self._pieces(PieceKind.CONTROL)
        self._pattern = control_pattern(controls)
        self._skeleton.cache_clear()
        self.control_ids = frozenset(controls.values())

    def _find_ends(self, path: Path) -> None:
        eos, pad = self._model.eos_id(), self._model.pad_id()
        turn = -1 if self._end_of_turn is None else self._model.piece_to_id(self._end_of_turn)
        if max(eos, turn) < 0:
            raise DataError(
                f"{path}: the tokenizer cannot end an answer; got no eos piece and no control "
                "piece after an answer in the chat template; expected one"
            )
        self.eos_id = turn if eos < 0 else eos
        self.end_of_turn_id = self.eos_id if turn < 0 else turn
        self.pad_id = self.eos_id if pad < 0 else pad

    def encode_text(self, text: str) -> TokenIds:
        return tuple(self._model.encode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text, run = "", []
        for index in ids:
            if index not in self.control_ids:
                run.append(int(index))
            elif not skip_special_tokens:
                text += self._model.decode(run) + self._model.id_to_piece(int(index))
                run = []
        return text + self._model.decode(run)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> TokenIds:
        rendered = self._render(messages, add_generation_prompt)
        skeleton = self._skeleton(roles_of(messages), add_generation_prompt)
        ids: list[int] = []
        for piece in safe_pieces(skeleton, messages, rendered, self._pattern):
            if isinstance(piece, Control):
                ids.append(self._model.piece_to_id(piece.token))
            else:
                ids += self._model.encode(piece)
        return tuple(ids)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens(),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise template_error(error, messages) from error

    def _special_tokens(self) -> dict[str, str]:
        spec = self._proto.trainer_spec
        ids = {"bos": spec.bos_id, "eos": spec.eos_id, "pad": spec.pad_id, "unk": spec.unk_id}
        pieces = self._proto.pieces
        return {f"{name}_token": pieces[i].piece for name, i in ids.items() if i >= 0}

    def save_pretrained(self, folder: str | Path) -> None:
        export_sentencepiece(self._proto, self._template, self._special_tokens(), Path(folder))

    def fingerprint(self) -> str:
        return vocabulary_hash(self._pieces(), self.control_ids, self._template)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out_prefix: str | Path) -> Path:
    """Train a unigram model that encodes any text and decodes it exactly; writes OUT_PREFIX.model.

    The same texts give the same file. Raises DataError if they are too few for `vocab_size`.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            # Sentencepiece would leave out long texts; a newline is a byte piece in any case.
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            control_symbols=list(CONTROL_SYMBOLS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"cannot train a tokenizer of {vocab_size} pieces: {error}; use more text or another "
            "vocab_size"
        ) from error
    path = Path(f"{out_prefix}.model")
    path.write_bytes(_with_round_scores(model.getvalue()))
    return path


def _with_round_scores(serialized: bytes) -> bytes:
    # Sums of multiples of 1/64 are exact in float32 and float64 alike. Otherwise rounding would
    # decide between equally good cuts, such as 0|00 and 00|0, one way in sentencepiece and the
    # other way in the exported tokenizer.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    proto = ModelProto.FromString(serialized)
    for piece in proto.pieces:
        piece.score = round(piece.score * 64) / 64
    return proto.SerializeToString(deterministic=True)


def _processor(proto: Any) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _default_template(pieces: dict[str, int], path: Path) -> str:
    missing = [symbol for symbol in CONTROL_SYMBOLS if symbol not in pieces]
    if missing:
        raise DataError(
            f"{path}: the tokenizer has no chat template; got a model without the pieces "
            f"{missing} of the default one; expected a jinja file in model.tokenizer.chat_template"
        )
    return DEFAULT_TEMPLATE


def _compile(template: str, path: Path) -> Any:
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # The same settings as in transformers, where the exported tokenizer renders this template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise DataError(
            f"{path}: the chat template is not valid jinja: {error}; change "
            "model.tokenizer.chat_template"
        ) from error
