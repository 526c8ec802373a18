"""Spoken benchmark pairs in the style of tStoryCloze and sBLIMP: folders of wav files and manifest.jsonl.

    make_sblimp(cfg, pool)    # writes OUT/sblimp; eval.py --manifest=OUT/sblimp scores it

`cfg` is synth_stories.py's Config, `pool` a pool of slam.tts.speakers. A story is {"id", "sentences"}.
"""
import json
from pathlib import Path

import numpy as np

from slam.tts import spoken, write_audio
from slam.units import write_atomic


def exchange(items: list, seed: int) -> list:
    """Permute two or more items along one random cycle, so that none keeps its place; seeded."""
    order = np.random.default_rng(seed).permutation(len(items))
    source = dict(zip(order, np.roll(order, 1)))  # one cycle through all places
    return [items[source[i]] for i in range(len(items))]


def write_benchmark(cfg, pool, name: str, pairs: list[dict], texts: dict[str, list[str]]) -> None:
    """Speak `texts` {id: sentences}; write two wavs a pair and manifest.jsonl; nothing if the manifest is there.

    A pair's "positive" and "negative" are ids of the texts that make up the side; they become names of wav files.
    """
    folder = Path(cfg.out) / name
    if (folder / "manifest.jsonl").exists():
        return
    waves = dict(spoken(cfg, pool, texts, f"speaking {name}"))
    for pair in pairs:
        for side in ("positive", "negative"):
            parts, pair[side] = [wave for id in pair[side] for wave in waves[id]], f"{pair['id']}_{side}.wav"
            write_audio(folder / pair[side], np.concatenate(parts))
    write_atomic(folder / "manifest.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))


def make_tstorycloze(cfg, pool, stories: list[dict]) -> None:
    """tStoryCloze-style pairs: four sentences and their true fifth, against the fifth of another story."""
    texts, pairs = {}, []
    for story, other in zip(stories, exchange(stories, cfg.seed)):
        id, (*beginning, ending) = story["id"], story["sentences"][:5]
        texts |= {f"{id} beginning": beginning, f"{id} ending": [ending]}
        pairs.append({"id": id, "other": other["id"], "positive_text": " ".join([*beginning, ending]),
                      "negative_text": " ".join([*beginning, other["sentences"][4]]),
                      "positive": [f"{id} beginning", f"{id} ending"],
                      "negative": [f"{id} beginning", f"{other['id']} ending"]})
    write_benchmark(cfg, pool, "tstorycloze", pairs, texts)


def grammar_pair(kind: str, i: int, rng: np.random.Generator) -> tuple[str, str]:
    """A grammatical and an ungrammatical sentence that differ in one point; the right form alternates with i.

    So single words give nothing away: `is` is right for even i, `are` for odd i.
    grammar_pair("subject_verb_agreement", 0, rng) -> ("The dog near the tree is sleeping.", "… are sleeping.")
    """
    def pick(words):
        return str(rng.choice(words.split()))

    noun, verb = pick("dog cat bird boy girl teacher farmer rabbit horse king"), pick(
        "sleeping singing running eating playing waiting smiling")
    where = str(rng.choice(["in the garden", "near the tree", "by the house", "at the school", "on the hill"]))
    if kind == "subject_verb_agreement":
        subject = f"The {noun}{'s' * (i % 2)} {where if rng.random() < 0.5 else ''}".strip()
        verbs = [("is", "are"), ("was", "were"), ("has been", "have been")][int(rng.integers(3))]
        good, bad = verbs[i % 2], verbs[1 - i % 2]
        return f"{subject} {good} {verb}.", f"{subject} {bad} {verb}."
    if kind == "determiner_noun_agreement":
        singular, plural = [("this", "these"), ("that", "those"), ("a", "many"), ("every", "several")][i // 2 % 4]
        determiner, right, wrong = (singular, noun, noun + "s") if i % 2 else (plural, noun + "s", noun)
        name, saw = pick("Tom Mia Anna Ben Lucy Sam"), pick("saw found liked heard met")
        return f"{name} {saw} {determiner} {right} {where}.", f"{name} {saw} {determiner} {wrong} {where}."
    if kind == "reflexive":
        who = [("boy king man grandfather brother", "himself"), ("girl queen woman grandmother sister", "herself"),
               ("boys girls children friends kings", "themselves")]
        (subjects, right), (_, wrong) = who[i % 3], who[(i + 1 + i // 3 % 2) % 3]
        start = f"The {pick(subjects)} {pick('saw hurt helped washed liked')}"
        return f"{start} {right} {where}.", f"{start} {wrong} {where}."
    assert kind == "word_order"
    name, adjective, thing = pick("Tom Mia Anna Ben"), pick("red big old small shiny"), pick("apple ball box kite hat")
    return [(f"{name} found the {adjective} {thing} {where}.", f"{name} found the {thing} {adjective} {where}."),
            (f"The {noun} will not be {verb} {where}.", f"The {noun} not will be {verb} {where}."),
            (f"{name} put the {adjective} {thing} on the table.", f"{name} put {adjective} the {thing} on the table."),
            (f"The {noun} is {verb} {where}.", f"The {noun} {verb} is {where}.")][i % 4]


GRAMMAR = "subject_verb_agreement determiner_noun_agreement reflexive word_order".split()


def make_sblimp(cfg, pool) -> None:
    """sBLIMP-style pairs: a grammatical and an ungrammatical sentence from templates, each kind equally often."""
    rng, pairs, texts, seen = np.random.default_rng((cfg.seed, 1)), [], {}, set()
    for i in range(cfg.n_sblimp):
        id, kind = f"{i:05d}", GRAMMAR[i % len(GRAMMAR)]
        drawn = (grammar_pair(kind, i // len(GRAMMAR), rng) for _ in range(1000))
        new = next((pair for pair in drawn if pair not in seen), None)
        if new is None:
            raise SystemExit(f"n_sblimp: the templates give some {len(pairs):,} different pairs, not {cfg.n_sblimp:,}")
        seen.add(new)
        texts |= {f"{id} positive": [new[0]], f"{id} negative": [new[1]]}
        pairs.append({"id": id, "type": kind, "positive_text": new[0], "negative_text": new[1],
                      "positive": [f"{id} positive"], "negative": [f"{id} negative"]})
    write_benchmark(cfg, pool, "sblimp", pairs, texts)
