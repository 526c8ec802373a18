"""Speech and text in one stream: the mixed vocabulary, and rows that are made anew every epoch.

A mixed model's vocabulary begins like every unit LM's, so it uses the same unit files, pairs and benchmarks:

    PAD 0 · BOS = EOS 1 · unit u is token u + 2 · two markers · text token t is token t + the number of all these

An utterance is `1 units 1`, `1 text 1`, or, interleaved, spans of whole words in either: `1 <text> It was a <speech>
units 1`. A marker stands before every span of an interleaved utterance, and nowhere else (as in SlamKit).
"""
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from slam.embedded import resolve
from slam.packing import Packed, Rows, cut
from slam.units import BOS, EOS, OFFSET, Fingerprint, UnitReader, sha256_of, vocab_size

SPEECH, TEXT, INTERLEAVED = range(3)  # kinds of utterances
KINDS = ("speech", "text", "interleaved")


# ---------------------------------------------------------------- vocabulary
class Vocabulary:
    """Numbers of the tokens of a mixed model: `speech` and `text` are the markers, `first_text` is text token 0."""

    def __init__(self, fingerprint: Fingerprint):
        self.speech = vocab_size(fingerprint.n_units)
        self.text, self.first_text = self.speech + 1, self.speech + 2


class TextTokenizer:
    """A text LM's tokenizer by name: hub id, folder or embedded:NAME."""

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoTokenizer
        folder = resolve(name)
        try:
            self.name, self.tokenizer = name, AutoTokenizer.from_pretrained(folder)
            self.vocab = AutoConfig.from_pretrained(folder).vocab_size  # embedding rows, often some more than tokens
        except (OSError, ValueError) as e:
            raise SystemExit(f"{name}: no tokenizer of a text LM there ({str(e).splitlines()[0]})") from None

    def fingerprint(self, of_units: Fingerprint) -> Fingerprint:
        """The fingerprint of units, with this tokenizer's beside it."""
        digest = sha256_of(*sorted(self.tokenizer.get_vocab().items()))
        return replace(of_units, text_lm=self.name, text_vocab=self.vocab, text_sha256=digest)

    def words(self, text: str, follows: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Text tokens (n,) of a text (a space before it if it follows another), and each word's first (m,).

        words("It was") -> [1589, 436], [0, 1]
        """
        pieces = [self.tokenizer(" " * (follows or i > 0) + word, add_special_tokens=False).input_ids
                  for i, word in enumerate(text.split())]
        return np.array([t for piece in pieces for t in piece]), np.cumsum([0, *map(len, pieces[:-1])])


# ---------------------------------------------------------------- spans of an utterance
def poisson_spans(n_words: int, rng: np.random.Generator, share: float, mean: float = 10) -> np.ndarray:
    """Which words (n_words,) bool are spoken: spans of Poisson(mean) words at random places, until `share` of all are.

    As in SlamKit and Zeng et al. 2024 (arXiv 2411.17607): a span neither overlaps another nor begins right after one.
    """
    spoken = np.zeros(n_words, dtype=bool)
    for start in rng.permutation(n_words):
        span = slice(start, start + max(1, rng.poisson(mean)))
        if spoken.sum() < share * n_words and not spoken[max(0, start - 1):span.stop].any():
            spoken[span] = True
    return spoken


def chunk_spans(n_words: int, rng: np.random.Generator) -> np.ndarray:
    """Which words (n_words,) bool are spoken: in turn 10 to 30 words of text and 5 to 15 of speech (LF²AR)."""
    spoken, at, now = np.zeros(n_words, dtype=bool), 0, bool(rng.integers(2))
    while at < n_words:
        length = rng.integers(5, 16) if now else rng.integers(10, 31)
        spoken[at:at + length] = now
        at, now = at + length, not now
    return spoken


def interleave(units: np.ndarray, text: np.ndarray, words: np.ndarray, spoken: np.ndarray,
               vocabulary: Vocabulary) -> np.ndarray:
    """One utterance, its words partly as units and partly as text -> tokens (n,) int64, with a marker a span.

    units (T,), text (n,); words (m, 2): first text token and first unit of each; spoken (m,) bool.
    Two words, of units 5 6 and 7, and text tokens 0 and 1, the second spoken: 1 <text> t0 <speech> u7 1.
    """
    edges = [0, *np.flatnonzero(np.diff(spoken)) + 1, len(words)]
    bounds = np.concatenate([words, [[len(text), len(units)]]])
    tokens = [[BOS]]
    for a, b in zip(edges, edges[1:]):
        (text_begin, unit_begin), (text_end, unit_end) = bounds[a], bounds[b]
        if spoken[a]:
            tokens += [[vocabulary.speech], units[unit_begin:unit_end] + OFFSET]
        else:
            tokens += [[vocabulary.text], text[text_begin:text_end] + vocabulary.first_text]
    return np.concatenate([*tokens, [EOS]]).astype(np.int64)


# ---------------------------------------------------------------- a corpus, new in every epoch
class Mixed:
    """Unit files with words as utterances of three kinds, in a new form every epoch.

    `tokens(epoch * n + i)` is utterance i in this epoch, a pure function of (seed, epoch, i). Kinds are drawn such that
    their tokens have the given `shares`, (speech, text, interleaved).
    spans: `poisson_spans` up to `share` of the words, or `chunk_spans`. SystemExit if the unit files have no words.
    """

    def __init__(self, reader: UnitReader, shares: tuple[float, float, float], seed: int, spans: str = "poisson",
                 share: float = 0.3):
        if bare := next((shard.path for shard in reader.shards if not shard.fingerprint.text_lm), None):
            raise SystemExit(f"{bare}: has no words; python -m slam.alignment writes unit files with them")
        self.reader, self.n, self.seed = reader, len(reader), seed
        self.vocabulary, self.spans, self.share = Vocabulary(reader.fingerprint), spans, share
        some = np.linspace(0, self.n - 1, min(500, self.n)).astype(int).tolist()  # of all sources
        of_kind = [np.mean([len(self.form(i, kind, 0)) for i in some]) for kind in range(3)]
        odds = np.array(shares) / of_kind  # from shares of tokens to shares of utterances
        self.odds = odds / odds.sum()

    def check(self) -> None:
        self.reader.check()

    def require_text_of(self, base: str) -> None:
        """SystemExit unless the text tokens are those of this text LM, whose embeddings are to be kept."""
        mine = self.reader.fingerprint
        theirs = TextTokenizer(base).fingerprint(mine)
        if (theirs.text_vocab, theirs.text_sha256) != (mine.text_vocab, mine.text_sha256):
            raise SystemExit(f"{base}: its text tokens are not those of {self.reader.shards[0].path}, {mine.text_lm}; "
                             f"take that base, or align again with --text_lm {base}")

    def form(self, i: int, kind: int, epoch: int) -> np.ndarray:
        """Tokens of utterance i as one of the three kinds; its spans are those of the epoch."""
        if kind == SPEECH:
            return self.reader.tokens(i)
        text, words = self.reader.words(i)
        if kind == TEXT:
            return np.concatenate([[BOS], text + self.vocabulary.first_text, [EOS]])
        rng = np.random.default_rng((self.seed, epoch, i, 1))
        spoken = poisson_spans(len(words), rng, self.share) if self.spans == "poisson" else chunk_spans(len(words), rng)
        return interleave(self.reader.units(i), text, words, spoken, self.vocabulary)

    @lru_cache(maxsize=4)  # the packer's epoch, and those that a step reads
    def kinds(self, epoch: int) -> np.ndarray:
        """Kind (n,) of each utterance in an epoch."""
        return np.random.default_rng((self.seed, epoch, 1)).choice(3, self.n, p=self.odds)

    def tokens(self, number: int) -> np.ndarray:
        epoch, i = divmod(number, self.n)
        return self.form(i, self.kinds(epoch)[i], epoch)

    def lengths(self, kinds: np.ndarray, epoch: int) -> np.ndarray:
        """Lengths (n,) in tokens of all utterances, of these kinds (n,), in an epoch; builds only interleaved ones."""
        text = np.concatenate([np.diff(shard.ends[:, 0], prepend=0) for shard in self.reader.shards])
        lengths = np.where(kinds == SPEECH, self.reader.lengths, text + 2)
        for i in np.flatnonzero(kinds == INTERLEAVED).tolist():
            lengths[i] = len(self.form(i, INTERLEAVED, epoch))
        return lengths

    def view(self, kind: int) -> SimpleNamespace:
        """All utterances as one kind, in their form of epoch 0: a corpus for validation."""
        return SimpleNamespace(tokens=lambda i: self.form(i, kind, 0), check=self.check,
                               lengths=self.lengths(np.full(self.n, kind), 0))


class MixedRows(Rows):
    """`Rows` of a `Mixed` corpus, packed anew every epoch, since the lengths of its utterances change.

    A resumed run packs all earlier epochs again, since their numbers of rows are not stored.
    """

    def __init__(self, corpus: Mixed, context: int, rows_per_step: int, seed: int, rank: int = 0, world: int = 1):
        self.corpus, self.context, self.rows_per_step, self.seed = corpus, context, rows_per_step, seed
        self.rank, self.world, self.epochs, self.end = rank, world, [], 0  # the last two epochs; rows of all so far
        self.packed = self.make_epoch(0)  # the first epoch stands for all in `keys` and `fill`

    def make_epoch(self, epoch: int) -> Packed:
        chunks = cut(self.corpus.lengths(self.corpus.kinds(epoch), epoch), self.context)
        chunks[:, 0] += epoch * self.corpus.n
        rng = np.random.default_rng((self.seed, epoch))
        packed = Packed(chunks, self.context, rng)
        self.epochs = [*self.epochs[-1:], (epoch, self.end, packed, rng.permutation(len(packed)))]
        self.end += len(packed)
        return packed

    def row(self, index: int) -> np.ndarray:
        if index < self.epochs[0][1]:  # an earlier step, whose epoch was dropped: start from the first epoch
            self.epochs, self.end = [], 0
            self.make_epoch(0)
        while index >= self.end:
            self.make_epoch(self.epochs[-1][0] + 1)
        _, begin, packed, order = next(x for x in reversed(self.epochs) if x[1] <= index)
        return packed[int(order[index - begin])]
