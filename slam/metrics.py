"""slam.metrics."""
import math
import re
from collections import defaultdict

import numpy as np

from slam.benchmarks import SUBSETS


def pair_accuracy(positive: np.ndarray, negative: np.ndarray, items: list[str] | None = None) -> dict:
    """Share (%) of pairs whose positive has the lower NLL, a tie counting half, with its standard error.

    items: what each pair is about; pairs of one item (in several voices) are not independent: the standard error is
    then that of the items' means, weighted by their pairs, and a 95 % bootstrap interval over items is given, too.
    Pairs that have no NLL are left out and counted.
    pair_accuracy([1.0, 2.0], [1.5, 2.0]) -> {"value": 75.0, "se": 25.0, "n": 2, "ties": 1}
    """
    known = np.isfinite(positive) & np.isfinite(negative)
    correct = np.where(positive == negative, 0.5, positive < negative)[known]
    n = len(correct)
    if not n:
        return {"value": math.nan, "se": math.nan, "n": 0, "ties": 0, "failed": int((~known).sum())}
    result = {"value": 100 * correct.mean(), "se": 100 * correct.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan,
              "n": n, "ties": int((positive == negative)[known].sum())}
    if not known.all():
        result["failed"] = int((~known).sum())
    _, item = np.unique(np.array(items or range(len(known)))[known], return_inverse=True)
    if (n_items := item.max() + 1) < n:
        sums, sizes = np.bincount(item, correct), np.bincount(item)
        draws = np.random.default_rng(0).multinomial(n_items, np.full(n_items, 1 / n_items), 1000)
        means = 100 * (draws @ sums) / (draws @ sizes)
        if n_items == 1:
            return result | {"se": math.nan, "items": 1}
        se = means.std() * math.sqrt(n_items / (n_items - 1))
        result |= {"se": se, "interval": np.percentile(means, (2.5, 97.5)).tolist(), "items": int(n_items)}
    return result


def score_pairs(nll: np.ndarray, pairs: list[dict]) -> dict:
    """`pair_accuracy` of NLLs (n, 2) over all pairs (micro, as SlamKit), and "by" each subset of the manifest's fields.

    macro: mean over items of the mean over an item's voices, as ZeroSpeech has it.
    """
    items = [p.get("item") or p["id"] for p in pairs]
    result, by = pair_accuracy(*nll.T, items), {}
    for name in (*SUBSETS, "voice"):
        values = [p.get(name) for p in pairs]
        if any(values):
            by[name] = {v: pair_accuracy(*nll[rows := [i for i, u in enumerate(values) if u == v]].T,
                                         [items[i] for i in rows]) for v in sorted(set(filter(None, values)))}
    if by:
        groups = defaultdict(list)
        for i in np.flatnonzero(np.isfinite(nll).all(1)):
            groups[items[i]].append(0.5 if nll[i, 0] == nll[i, 1] else float(nll[i, 0] < nll[i, 1]))
        means = [100 * np.mean(x) for x in groups.values()]
        result["macro"] = float(np.mean(means)) if means else None
        result["macro_se"] = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
        result["by"] = by
    return result


# The Penn Treebank's rules as in NLTK 3.9.1, the release of SlamKit's time (since 3.9.3 it splits dashes, too). Applied
# in order; each puts spaces around what is a word of its own.
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
    """Word tokens of NLTK's `NLTKWordTokenizer`, with which SlamKit counts n-grams; case is kept.

    words("A girl. She didn't, he said.") -> ["A", "girl.", "She", "did", "n't", ",", "he", "said", "."]
    """
    for pattern, replacement in TREEBANK:
        text = pattern.sub(replacement, text)
    return text.split()


def auto_bleu(text: str, n: int = 2, overlapping: bool = True) -> float:
    """Share of a text's n-gram positions whose n-gram stands elsewhere in it too (SlamKit's auto-BLEU); 0 if too short.

    overlapping: whether elsewhere may be a place that shares words with the first; not so in GSLM's auto-BLEU.
    auto_bleu("a b a b") -> 2/3: "a b" twice, "b a" once; auto_bleu("ha ha ha", overlapping=False) -> 0
    """
    tokens, places = words(text), defaultdict(list)
    for i in range(len(tokens) - n + 1):
        places[tuple(tokens[i:i + n])].append(i)
    distance = 1 if overlapping else n  # positions are in order, so the first and the last are farthest from any
    again = sum(max(i - at[0], at[-1] - i) >= distance for at in places.values() for i in at)
    return again / max(1, len(tokens) - n + 1)


def word_error_rate(reference: str, heard: str) -> tuple[int, int]:
    """(edit distance in words, words of the reference), case and punctuation aside."""
    a, b = (re.findall(r"[\w']+", t.lower()) for t in (reference, heard))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1], len(a)


def standard_error(values: np.ndarray, n_seeds: int) -> float | None:
    """Of the mean of values of all prompts, seed after seed: over prompts, whose continuations are not independent."""
    by_prompt = values.reshape(n_seeds, -1)
    known = ~np.isnan(by_prompt)
    means = (np.nansum(by_prompt, 0) / np.maximum(known.sum(0), 1))[known.any(0)]
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
