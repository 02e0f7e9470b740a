"""Captions to token ids: the one tokenizer, trained here or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmray.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

VOCABULARY_SIZE = 8192
"""Size of a WordPiece vocabulary that is trained here; captions of one archive rarely need more."""

MAX_CHARACTERS = 4096
"""A longer caption is cut before it is tokenized: 512 tokens never need more of it."""

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def is_blank(caption: str | None) -> bool:
    """Tell whether a caption says nothing: null, empty, or white space alone."""
    return caption is None or not caption.strip()


def train_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train a WordPiece tokenizer of BERT's kind: lower case, accents stripped, words that occur once split.

    The same captions give the same vocabulary, in any order and on any machine.

    Args:
        captions: training captions; blank ones do no harm.
    """
    from tokenizers import processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [_cut(caption) for caption in captions]
    scratch = _word_piece({})
    characters = sorted(
        {c for text in texts for c in scratch.normalizer.normalize_str(text) if not c.isspace()}
    )
    # The trainer numbers characters in the order of a hash table, and breaks ties by these numbers. What is
    # declared special is numbered first and as given; in the tokenizer that is kept it is not special.
    fixed = [*SPECIAL_TOKENS.values(), *(f"##{character}" for character in characters)]
    scratch.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=VOCABULARY_SIZE + len(characters),
            min_frequency=2,
            show_progress=False,
            special_tokens=fixed,
        ),
    )
    tokenizer = _word_piece(scratch.get_vocab())
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def _word_piece(vocabulary: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or from a local folder.

    Raises:
        ConfigError: it is not there, or the network is not.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer {str(name)!r} here or in reach: point --text at a folder that has tokenizer.json, "
            f"or set HF_HOME to a cache that has it ({type(error).__name__})"
        ) from None
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str | None], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn captions into ids, padded to the longest of them.

    Args:
        tokenizer: of the model.
        captions: B captions; a null one is an empty one.
        max_tokens: longer captions are cut to this.

    Returns:
        input_ids: int64 (B, T), T <= max_tokens.
        attention_mask: int64 (B, T), 1 where a token stands.
    """
    texts = [_cut(caption or "") for caption in captions]
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length=max_tokens, return_token_type_ids=False
    )
    # Made here, since transformers would walk through each list in Python first: half of the time.
    return np.array(tokens["input_ids"], np.int64), np.array(tokens["attention_mask"], np.int64)


def _cut(caption: str) -> str:
    """Cut a caption to the part that counts, and make it text that can be encoded, as tokenizers ask for."""
    if len(caption) > MAX_CHARACTERS:
        caption = caption.lstrip()[:MAX_CHARACTERS]
    if caption.isascii():
        return caption
    return caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of a pair alone
