"""Train a byte-pair encoding with Hugging Face's tokenizers."""

import os
from pathlib import Path

from gpt import atomic, cli
from gpt.tokenizer import ENDS_OF_TEXT
from train.prepare.documents import Corpus

N_BYTES = 256  # each byte is a token, so that any text can be encoded


def train_tokenizer(corpus: Corpus, vocab_size: int, path: Path) -> None:
    """Learns at most `vocab_size` tokens from the training split and writes a tokenizer.json.

    Raises ValueError.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise ValueError(f"this needs the package tokenizers: {cli.install('data')}") from None
    if vocab_size <= N_BYTES:
        raise ValueError(f"vocab_size={vocab_size} must be above {N_BYTES}: each byte is a token already")
    if path.exists():
        raise ValueError(f"{path} exists already; remove it, or choose another --output")
    bpe = ByteLevelBPETokenizer()
    texts = (piece for piece in corpus.train.pieces() if piece is not None)
    bpe.train_from_iterator(texts, vocab_size, show_progress=os.isatty(2), special_tokens=[ENDS_OF_TEXT[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, bpe.to_str(pretty=True))
    n_tokens = bpe.get_vocab_size()
    reason = "" if n_tokens == vocab_size else f": the text does not give {vocab_size:,}"
    print(f"{path}: {n_tokens:,} tokens{reason}")
