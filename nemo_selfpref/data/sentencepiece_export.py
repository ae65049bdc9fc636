"""A sentencepiece model as a Hugging Face tokenizer that gives the same ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_selfpref.data.huggingface_tokenizer import save_portable
from nemo_selfpref.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_PROBES = (
    "Hello, world",
    "  two  spaces \n\n\ttab \r\n end  ",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600\U0001f1e9\U0001f1ea e\u0301",
    "<0x41> <0x0A><0xFF> <s></s><unk>",
    "def f(x): return {x: 10_000.5}\n" * 3,
    "",
)


class PieceKind(IntEnum):
    """The kinds of piece a sentencepiece model has."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_model(path: Path) -> Any:
    """The ModelProto in a .model file; DataError if the file holds none."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise DataError(f"{path}: not a sentencepiece model: {error}; expected a .model") from error
    if not proto.pieces:
        raise DataError(f"{path}: not a sentencepiece model; got no pieces; expected a .model file")
    return proto


def export_sentencepiece(
    proto: Any, chat_template: str, special_tokens: Mapping[str, str], folder: Path
) -> None:
    """Write a Hugging Face tokenizer with the ids of the sentencepiece model `proto`.

    Raises DataError for a model whose features the `tokenizers` library cannot reproduce.
    """
    from transformers import PreTrainedTokenizerFast

    backend = convert(proto)
    controls = [p.piece for p in proto.pieces if p.type == PieceKind.CONTROL]
    named = {"pad_token": special_tokens.get("eos_token"), **special_tokens}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[c for c in controls if c not in named.values()],
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token is not None},
    )
    tokenizer.chat_template = chat_template
    save_portable(tokenizer, folder)


def convert(proto: Any) -> Tokenizer:
    """A `tokenizers` tokenizer with the ids of the sentencepiece model `proto`, checked on samples.

    Raises DataError for a model whose features the library cannot reproduce.
    """
    from tokenizers import Tokenizer

    _check_supported(proto)
    is_unigram = proto.trainer_spec.model_type == _UNIGRAM
    tokenizer = Tokenizer(_unigram(proto) if is_unigram else _bpe(proto))
    tokenizer.normalizer = _normalizer(proto)
    if is_unigram and proto.trainer_spec.byte_fallback:
        tokenizer.pre_tokenizer = _byte_name_cutter(proto)
    tokenizer.decoder = _decoder(proto)
    _add_tokens(tokenizer, proto)
    _verify(tokenizer, proto)
    return tokenizer


def _check_supported(proto: Any) -> None:
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    unsupported = {
        "a model type other than unigram and BPE": trainer.model_type not in (_UNIGRAM, _BPE),
        "spaces at the end of pieces": trainer.treat_whitespace_as_suffix,
        "unescaped spaces": not normalizer.escape_whitespaces,
    }
    found = [feature for feature, present in unsupported.items() if present]
    if found:
        raise DataError(
            f"the sentencepiece model cannot be written as a Hugging Face tokenizer; got "
            f"{found[0]}; expected a unigram or BPE model with standard spaces"
        )


def _add_tokens(tokenizer: Tokenizer, proto: Any) -> None:
    from tokenizers import AddedToken

    for piece in proto.pieces:
        special = piece.type in (PieceKind.CONTROL, PieceKind.UNKNOWN)
        # A plain space never survives normalization, so such a piece is never found in text.
        if special or (piece.type == PieceKind.USER_DEFINED and " " not in piece.piece):
            spaced = not special and _SPACE in piece.piece
            token = AddedToken(piece.piece, normalized=spaced, special=special)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])


def _unigram(proto: Any) -> Any:
    from tokenizers.models import Unigram

    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    spec = proto.trainer_spec
    return Unigram(vocabulary, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _bpe(proto: Any) -> Any:
    from tokenizers.models import BPE

    spec = proto.trainer_spec
    return BPE(
        {piece.piece: index for index, piece in enumerate(proto.pieces)},
        _merges(proto),
        unk_token=proto.pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    scores = {p.piece: p.score for p in proto.pieces if p.type == PieceKind.NORMAL}
    merges = [
        (-scores[whole], index, whole[:index], whole[index:])
        for whole in scores
        for index in range(1, len(whole))
        if whole[:index] in scores and whole[index:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _normalizer(proto: Any) -> Any:
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _byte_name_cutter(proto: Any) -> Any:
    """Keeps text that spells a byte piece, "<0x41>", from being read as that piece.

    The `tokenizers` library cannot tell byte pieces from others, so such text is cut in two, where
    no other piece could have lain across the cut.
    """
    from tokenizers import Regex, pre_tokenizers

    hexadecimal = "[0-9A-F]"
    name = ("<", "0", "x", hexadecimal, hexadecimal, ">")
    normal = [p.piece for p in proto.pieces if p.type == PieceKind.NORMAL]
    for cut in range(1, len(name)):
        across = re.compile(name[cut - 1] + name[cut])
        if not any(across.search(piece) for piece in normal):
            before, tail = "".join(name[: cut - 1]), "".join(name[cut:])
            pattern = Regex(f"(?<={before}){name[cut - 1]}(?={tail})")
            return pre_tokenizers.Split(pattern, behavior="merged_with_previous")
    raise DataError("the sentencepiece model has pieces across every part of the text '<0x41>'")


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _verify(tokenizer: Tokenizer, proto: Any) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=proto.SerializeToString())
    # Spelled-out control pieces are tokens to one library and text to the other, by design.
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    special = [p.piece for p in proto.pieces if p.type in (PieceKind.CONTROL, PieceKind.UNKNOWN)]
    for probe in _PROBES:
        for token in special:
            probe = probe.replace(token, "")
        if tokenizer.encode(probe, add_special_tokens=False).ids != model.encode(probe):
            raise DataError(
                "the sentencepiece model cannot be written as a Hugging Face tokenizer; got other "
                f"ids for the text {probe!r}; expected the same"
            )
