"""The tokenizer of a LLaVA made of parts: the language model's, with an image token as llava-hf adds it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.families.chat_templates import choose_template, fit_template
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.reading import read_json

IMAGE_TOKEN = "<image>"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FILES = (
    *_VOCABULARIES, "merges.txt",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_UNUSED = (
    "tokenizer_class", "auto_map", "added_tokens_decoder", "chat_template", "sp_model_kwargs", "name_or_path",
)  # fmt: skip


class TokenizerFiles(NamedTuple):
    """A tokenizer as it is written into a checkpoint: contents by file name, and the ids of two tokens."""

    files: dict[str, Path | bytes]
    image_token: int
    pad_token: int | None


def find_tokenizer(
    source: Source, chosen: str | None, decoder: str, max_length: int | None
) -> TokenizerFiles | None:
    """The tokenizer that the user names, or the source's own, with an image token and a chat template.

    The ``model_type`` of the decoder decides the template. None if the user names none and the source has none.
    """
    tokenizer_source = open_source(chosen, near=source.folder) if chosen else source
    if not any((tokenizer_source.folder / name).is_file() for name in _VOCABULARIES):
        if chosen:
            raise PmodError(f"{chosen} has no tokenizer", "tokenizer.json or tokenizer.model")
        return None
    tokenizer = _load(tokenizer_source.folder)
    from transformers import AddedToken, AutoTokenizer

    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # what generating in batches needs; training pads by itself
    if max_length:
        tokenizer.model_max_length = max_length
    if getattr(tokenizer, "legacy", None) is not None:
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # else lost by saving, and tokens with it
    template = choose_template(decoder, tokenizer.get_vocab())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        files: dict[str, Path | bytes] = {path.name: path.read_bytes() for path in folder.iterdir()}
        files.pop("chat_template.jinja", None)
        if template:
            fitted = fit_template(
                template, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), IMAGE_TOKEN
            )
            files["chat_template.jinja"] = fitted.encode()
    return TokenizerFiles(files, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.pad_token_id)


def _load(folder: Path) -> Any:
    try:
        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            return _from_sentencepiece(folder)
        from transformers import AutoTokenizer

        # Beside a config of a model type that transformers does not know, it reads no tokenizer.
        with tempfile.TemporaryDirectory() as alone:
            for name in _FILES:
                if (folder / name).is_file():
                    (Path(alone) / name).write_bytes((folder / name).read_bytes())
            return AutoTokenizer.from_pretrained(alone, trust_remote_code=False)
    except Exception as error:  # of any kind, over a stranger's file
        raise PmodError(f"{folder} holds no usable tokenizer: {first_line(error)}") from error


def _from_sentencepiece(folder: Path) -> Any:
    """A Llama tokenizer of ``tokenizer.model`` alone, which is all that Vicuna has.

    transformers reads it through protobuf, whose versions have to match; sentencepiece itself needs none.
    """
    import sentencepiece
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    settings = {
        name: value["content"] if isinstance(value, dict) and "content" in value else value
        for name, value in settings.items()
        if name not in _UNUSED and value is not None
    }
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, None), **settings)
    if (folder / "added_tokens.json").is_file():
        added: dict[str, int] = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        tokenizer.add_tokens(sorted(added, key=lambda token: added[token]))
    return tokenizer
