"""sStoryCloze-style pairs of a folder that synth_stories.py has made: close wrong endings; 2 CPU seconds each.

    python dev/hard_negatives.py out/mini/part0    # writes out/mini/part0/sstorycloze
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

from slam.speech import continuation_scores
from slam.tts import speakers
from synth_stories import write_benchmark


def things(text: str, names: list[str]) -> set[str]:
    """The content words of a text, roughly: those of four letters and more, without names."""
    return {word.lower() for word in re.findall(r"\w{4,}", text) if word not in names}


def pronouns(text: str) -> set[str]:
    """The grammatical genders of a text's pronouns: {"he|him|his"}, {"she|her|hers"}, both or none."""
    return {gender for gender in ("he|him|his", "she|her|hers") if re.search(rf"\b({gender})\b", text, re.IGNORECASE)}


def make_sstorycloze(cfg, pool, stories: list[dict], n_candidates: int = 6, min_gap: float = 0.3) -> None:
    """sStoryCloze-style pairs: four sentences and their true fifth, against a close ending that fits less.

    Candidates are the endings of other stories that share the rarest words with this beginning and add no pronoun; this
    story's name replaces theirs. The first is taken that the writer (a text LM) finds at least `min_gap` nats per token
    less likely than the true one. No ending is used twice; a story without a candidate is left out.
    """
    if (Path(cfg.out) / "sstorycloze" / "manifest.jsonl").exists():
        return
    beginnings, endings = [" ".join(s["sentences"][:4]) for s in stories], [s["sentences"][4] for s in stories]
    names = json.loads(Path(cfg.openings).read_text(encoding="utf-8")).get("name", [])
    about, said = ([things(text, names) for text in texts] for texts in (beginnings, endings))
    found_in = Counter(word for words in about for word in words)
    candidates, offered = [], Counter()  # for each story [(index of the other story, its ending)], the closest first
    for i, beginning in enumerate(beginnings):
        name = next((word for word in re.findall(r"\w+", beginning) if word in names), None)
        shared = [sum(math.log(len(stories) / found_in[word]) for word in about[i] & words) for words in said]
        close = [j for j, ending in enumerate(endings) if name and ending != endings[i] and shared[j] > 0
                 and offered[j] < n_candidates and pronouns(ending) <= pronouns(f"{beginning} {endings[i]}")]
        close = sorted(close, key=lambda j: -shared[j])[:n_candidates]
        offered.update(close)  # an ending that suits many stories is offered to a few, so that each has its own
        candidates.append([(j, re.sub(r"\w+", lambda m: name if m[0] in names else m[0], endings[j])) for j in close])
    asked = [(beginnings[i], x) for i, others in enumerate(candidates) for x in (endings[i], *(x for _, x in others))]
    scores = iter(continuation_scores(*map(list, zip(*asked)), cfg.writer))
    texts, pairs, used = {}, [], set()
    for story, beginning, ending, others in zip(stories, beginnings, endings, candidates):
        true, *theirs = [next(scores) for _ in range(1 + len(others))]
        fits_less = [x for x, score in zip(others, theirs) if score <= true - min_gap and x[0] not in used]
        if fits_less:
            id, (j, worse) = story["id"], fits_less[0]
            used.add(j)
            texts |= {f"{id} beginning": story["sentences"][:4], f"{id} positive": [ending], f"{id} negative": [worse]}
            pairs.append({"id": id, "positive_text": f"{beginning} {ending}", "negative_text": f"{beginning} {worse}",
                          **{side: [f"{id} beginning", f"{id} {side}"] for side in ("positive", "negative")}})
    print(f"sstorycloze: {len(pairs)} pairs; {len(stories) - len(pairs)} stories have no close ending that fits less")
    write_benchmark(cfg, pool, "sstorycloze", pairs, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with stories.jsonl and synth.json")
    parser.add_argument("--workers", type=int, default=2, help="processes that speak")
    folder, workers = vars(parser.parse_args()).values()
    try:
        settings = json.loads((folder / "synth.json").read_text())["settings"]
        stories = [*map(json.loads, (folder / "stories.jsonl").read_text(encoding="utf-8").splitlines())]
    except FileNotFoundError as e:
        raise SystemExit(f"{e.filename}: missing; synth_stories.py makes such a folder") from None
    cfg = SimpleNamespace(**settings | {"out": str(folder), "workers": workers})
    with speakers(cfg.tts, cfg.workers) as pool:
        make_sstorycloze(cfg, pool, stories[:cfg.n_val])


if __name__ == "__main__":
    main()
