"""Metrics on numbers and texts: pair accuracy with its error, auto-BLEU, word error rate. No model, no audio."""
import math
import re
from collections import Counter

import numpy as np

SUBSETS = ("type", "subtype", "part", "frequency", "voice")  # manifest fields whose values get results of their own


def mean_and_error(x: np.ndarray) -> tuple[float | None, float | None]:
    """Mean of x (n,) and its standard error; None where there are too few values."""
    return float(x.mean()) if len(x) else None, float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None


def pair_accuracy(positive: np.ndarray, negative: np.ndarray, items: list[str] | None = None) -> dict:
    """Share (%) of pairs whose positive has the lower NLL, with its standard error; a tie counts half.

    positive, negative: NLLs (n,); a pair with a non-finite NLL is left out and counted as failed. items: the item of
    each pair. If items recur, in several voices, standard error and 95 % interval are bootstrapped over items, and
    "macro" is the mean over items of an item's mean over its voices (ZeroSpeech's average).
    pair_accuracy(np.array([1.0, 2.0]), np.array([1.5, 2.0])) -> {"value": 75.0, "se": 25.0, "n": 2, "ties": 1}
    """
    known = np.isfinite(positive) & np.isfinite(negative)
    correct = 100 * np.where(positive == negative, 0.5, positive < negative)[known]
    value, se = mean_and_error(correct)
    result = {"value": value, "se": se, "n": len(correct), "ties": int((positive == negative)[known].sum())}
    if not known.all():
        result["failed"] = int((~known).sum())
    _, item = np.unique(np.array(items or range(len(known)))[known], return_inverse=True)
    sums, sizes = np.bincount(item, correct), np.bincount(item)
    if (n_items := len(sizes)) < len(correct):
        macro, macro_se = mean_and_error(sums / sizes)
        result |= {"items": n_items, "macro": macro, "macro_se": macro_se, "se": None}
        if n_items > 1:
            draws = np.random.default_rng(0).multinomial(n_items, np.full(n_items, 1 / n_items), 1000)
            means = (draws @ sums) / (draws @ sizes)
            result |= {"se": float(means.std() * math.sqrt(n_items / (n_items - 1))),
                       "interval": np.percentile(means, (2.5, 97.5)).tolist()}
    return result


def score_pairs(nll: np.ndarray, pairs: list[dict]) -> dict:
    """`pair_accuracy` over all pairs of a manifest (SlamKit's average), and "by" each value of its SUBSETS.

    nll: (n, 2), of each pair's positive and negative.
    """
    items = [p.get("item") or f"pair {i}" for i, p in enumerate(pairs)]
    result, by = pair_accuracy(*nll.T, items), {}
    for name in SUBSETS:
        values = [p.get(name) for p in pairs]
        for value in sorted({v for v in values if v}):
            rows = [i for i, v in enumerate(values) if v == value]
            by.setdefault(name, {})[value] = pair_accuracy(*nll[rows].T, [items[i] for i in rows])
    return result | ({"by": by} if by else {})


def standard_error(values: np.ndarray, n_seeds: int) -> float | None:
    """Standard error over prompts of values (n_seeds * n_prompts,), seed after seed; nan values are left out.

    The continuations of one prompt are not independent, so they are averaged first.
    """
    by_prompt = values.reshape(n_seeds, -1)
    known = ~np.isnan(by_prompt)
    return mean_and_error((np.nansum(by_prompt, 0) / np.maximum(known.sum(0), 1))[known.any(0)])[1]


# The Penn Treebank's rules as in NLTK 3.9.1, the release of SlamKit's time (later ones also split dashes). They are
# applied in order; each puts spaces around what is a word of its own.
TREEBANK = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"[«“‘„]|``?", r" \g<0> "),  # opening quotes; the Treebank's are `` and ''
    (r'^"', " `` "),
    (r"""([ ([{<])("|'')""", r"\1 `` "),
    (r"(?i)'(?!re|ve|ll|[mtsdn])(\w)\b", r"' \1"),
    (r"""([^.])\.([])}>"'»”’ ]*)\s*$""", r"\1 . \2 "),  # the text's last full stop; others stay with their words
    (r"([:,])(\D|$)", r" \1 \2"),
    (r"\.{2,}|[;@#$%&?!]", r" \g<0> "),
    (r"([^'])' ", r"\1 ' "),
    (r"[][(){}<>*»”’]|--", r" \g<0> "),
    (r"""''|\"""", " '' "),
    (r"\A|\Z|\s+", " "),  # the rules below look for spaces
    (r"([^' ])('[sSmMdD]?) ", r"\1 \2 "),
    (r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 "),
    (r"(?i)\b(can(?=not)|d(?='ye)|gim(?=me)|gon(?=na)|got(?=ta)|lem(?=me)|more(?='n)|wan(?=na\s))"
     r"(not|'ye|me|na|ta|'n)\b", r" \1 \2 "),
    (r"(?i) ('t)(is)\b", r" \1 \2 "), (r"(?i) ('t)(was)\b", r" \1 \2 "))]


def words(text: str) -> list[str]:
    """Word tokens of NLTK's `NLTKWordTokenizer`, which SlamKit uses; case is kept.

    words("A girl. She didn't, he said.") -> ["A", "girl.", "She", "did", "n't", ",", "he", "said", "."]
    """
    for pattern, replacement in TREEBANK:
        text = pattern.sub(replacement, text)
    return text.split()


def auto_bleu(text: str, n: int = 2) -> float:
    """Share of a text's n-gram positions whose n-gram recurs in the text (SlamKit's auto-BLEU); 0 for a short text.

    auto_bleu("a b a b") -> 2/3: "a b" twice, "b a" once
    """
    tokens = words(text)
    grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
    counts = Counter(grams)
    return sum(counts[gram] > 1 for gram in grams) / max(1, len(grams))


def word_error_rate(reference: str, heard: str) -> tuple[int, int]:
    """Levenshtein distance in words and the number of reference words, without case and punctuation."""
    a, b = (re.findall(r"[\w']+", t.lower()) for t in (reference, heard))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1], len(a)
