"""A byte-pair encoding of one's own, trained by Hugging Face's tokenizers."""

import os
from pathlib import Path

from gpt import atomic
from gpt.tokenizer import ENDS_OF_TEXT
from train.prepare.documents import Corpus

BYTES = 256  # each has a token of its own, so any text can be encoded


def train_tokenizer(corpus: Corpus, vocab_size: int, path: Path) -> None:
    """Writes a tokenizer.json of at most `vocab_size` tokens, learnt from what the corpus has for training.

    Words are split off as GPT-2 splits them, with the space before each. Raises ValueError.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise ValueError(
            "a tokenizer is trained by the package tokenizers: pip install -e '.[data]'"
        ) from None
    if vocab_size <= BYTES:
        raise ValueError(f"vocab_size={vocab_size} must be above {BYTES}: each byte has a token already")
    if path.exists():
        raise ValueError(f"{path} is there already; remove it, or choose another --output")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (piece for piece in corpus.train.pieces() if piece is not None),
        vocab_size,
        show_progress=os.isatty(2),
        special_tokens=[ENDS_OF_TEXT[0]],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, bpe.to_str(pretty=True))
    tokens = bpe.get_vocab_size()
    few = "" if tokens == vocab_size else f": the text gives no more than that, not {vocab_size:,}"
    print(f"{path}: {tokens:,} tokens{few}")
