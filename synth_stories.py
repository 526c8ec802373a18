"""Text to speech to units: stories written by a text LM, spoken by a TTS; preference pairs and spoken benchmarks.

    python synth_stories.py config/demo_stories.py                      # 190 stories: 3 minutes on two CPU cores
    python synth_stories.py config/spoken_swag.py --swag SpokenSwag     # pairs of a folder of its parquet files
    python synth_stories.py config/spoken_swag.py --swag train.csv      # pairs of SWAG's text; hours of speaking

In:  a text LM, a TTS and a speech tokeniser, by name.
Out: one folder:  stories.jsonl · units/train, units/val (unit files) · pairs_train.jsonl, pairs_val.jsonl ·
     tstorycloze/, sblimp/ (wav files, manifest.jsonl) · audio/ (with --keep_audio) · synth.json (its
     settings, and whether it is done). With --swag only the two pair files and synth.json.

The same seed on the same machine gives the same files. A killed run goes on from its last whole batch of stories.
"""
import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import load_config
from model import UnitLM
from slam.audio import SAMPLE_RATE
from slam.device import fast_bfloat16, pick_device
from slam.embedded import resolve
from slam.tokenizer import SpeechTokenizer
from slam.tts import TTS, speakers, spoken, write_audio
from slam.units import UnitReader, UnitWriter, empty_folder, write_atomic, write_pairs


@dataclass
class Config:
    """Write, speak and tokenise stories."""
    out: str = "out/stories"  # folder to write; an interrupted run resumes in it
    writer: str = "embedded:smollm2-135m"  # text LM that writes the stories
    swag: str = ""  # make only preference pairs, of SWAG's train.csv (the one with gold-source and ending0 to ending3),
    # of a folder of slprl/SpokenSwag's parquet files, or of SlamKit's .jsonl of pairs with their units
    max_auto_bleu: float = 0.3  # leave out a SWAG pair if prompt and chosen text have this bigram auto-BLEU or more
    tts: str = "hibari"  # the voice: hibari, kokoro (its package installed) or fastspeech2 (from the hub)
    voices: tuple[str, ...] = ()  # of the TTS; empty: its first voice for stories, any of its voices for a SWAG pair
    tokenizer: str = ""  # codebook file, or `embedded`; `none` stops after the audio; empty: `embedded` for audio, and
    # the published mHuBERT-25hz's for SlamKit's .jsonl, which does not name its own
    n_train: int = 400  # stories to train on
    n_val: int = 40  # stories held out: validation units, validation pairs, tStoryCloze pairs
    n_pairs: int = 200  # preference pairs from the training stories or from SWAG, at most one from each
    n_sblimp: int = 100  # sentence pairs of the sBLIMP-style set
    openings: str = "assets/openings.json"  # word lists and sentence shapes of the openings that the LM continues
    max_sentences: int = 7  # of a story, its opening included; 5 at least
    max_new_tokens: int = 80  # text tokens that the LM adds to a story's opening; 0: a story is its opening
    temperature: float = 0.6  # of the text LM
    top_k: int = 40  # of the text LM
    batch: int = 128  # stories written together
    workers: int = 2  # processes that speak
    keep_audio: bool = False  # keep the spoken stories (16 kHz flac) in audio/
    seed: int = 0  # of everything
    overwrite: bool = False  # delete the folder and start again instead of resuming

    def problems(self) -> list[str]:
        found = []
        if self.tts not in TTS:
            found.append(f"tts = {self.tts!r}: expected one of {', '.join(TTS)}")
        elif unknown := set(self.voices) - set(TTS[self.tts][1]):
            found.append(f"voices: {self.tts} has {', '.join(TTS[self.tts][1])}, not {', '.join(sorted(unknown))}")
        if self.swag and self.tokenizer == "none":
            found.append("swag: pairs are of units, so a tokenizer is needed")
        if self.tokenizer == "none" and not self.keep_audio:
            found.append("tokenizer = none without keep_audio = true would leave nothing")
        if min(self.workers, self.batch) < 1 or self.max_sentences < 5:
            found.append("workers, batch: at least 1; max_sentences: at least 5, as a tStoryCloze pair takes five")
        counts = "n_val n_train n_pairs n_sblimp max_new_tokens top_k temperature seed".split()
        if negative := [name for name in counts if getattr(self, name) < 0]:
            found.append(f"{', '.join(negative)} must not be negative")
        if self.n_val < 4 and not self.swag:
            found.append("n_val: at least 4 stories, so that endings can be exchanged")
        return found


# ---------------------------------------------------------------- stories
# The text LM continues an opening, which keeps a small LM on topic; there are so many openings that they seldom repeat.
FIELD = re.compile(r"\{(a_)?((\w+?)\d*)\}")  # {hero}: of the list "hero"; {a_hero2}: another of it, with its article
def opening(lists: dict[str, list[str]], rng: np.random.Generator, key: str = "shape") -> str:
    """The first sentences of a story: a shape, filled with words of `lists` (assets/openings.json), or other shapes.

    "{name} was {a_trait} {hero}. The {hero} met {hero2}." -> "Lily was an old fox. The fox met bear."
    """
    words = {}

    def fill(field: re.Match) -> str:
        article, word_name, list_name = field.groups()
        word = words.setdefault(word_name, opening(lists, rng, list_name))
        return word if not article else f"an {word}" if word[0] in "aeiou" else f"a {word}"

    return FIELD.sub(fill, str(rng.choice(lists[key])))


def read_openings(path: str) -> dict[str, list[str]]:
    """The lists of `opening` in a JSON file. SystemExit if it can't be read, or lacks a list that a shape names."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        lists = {key: list(map(str, words)) for key, words in content.items()}
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise SystemExit(f"--openings={path}: not a JSON file of lists ({e})") from None
    used = {list_name for shapes in lists.values() for x in shapes for _, _, list_name in FIELD.findall(x)}
    if missing := sorted(key for key in used | {"shape"} if not lists.get(key)):
        raise SystemExit(f"--openings={path}: the list {missing[0]!r} is missing or empty")
    return lists


def split_sentences(text: str) -> list[str]:
    """Whole sentences of a text: split_sentences('Hi. "Go!" He ran') -> ['Hi.', '"Go!"']"""
    return re.findall(r'\S.*?[.!?]+["\']?(?=\s|$)', text)


def tidy(text: str, max_sentences: int = 7) -> list[str] | None:
    """Sentences of a story before the first that is hard to speak or repeats, at most `max_sentences`; None if < 5."""
    text = text.translate(str.maketrans("“”‘’—–\n", "\"\"''-- "))
    kept = []
    for sentence in split_sentences(re.sub(r"\s+", " ", text))[:max_sentences]:
        words = re.findall(r"[a-z']+", " ".join([*kept, sentence]).lower())
        bigrams = list(zip(words, words[1:]))
        if (not 2 <= len(sentence.split()) <= 25 or sentence in kept or len(set(bigrams)) <= 0.75 * len(bigrams)
                or not re.fullmatch(r"(?!.*\w{25})[A-Za-z0-9 ,.!?'\"-]+", sentence)):
            break
        kept.append(sentence)
    return kept if len(kept) >= 5 else None


def write_stories(cfg: Config, n: int) -> list[dict]:
    """n stories [{"id", "sentences"}], kept in stories.jsonl batch by batch, each seeded by (seed, its number)."""
    path = Path(cfg.out) / "stories.jsonl"
    stories = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if len(stories) >= n:
        return stories[:n]
    from transformers import AutoTokenizer
    lists = read_openings(cfg.openings)
    lm = UnitLM.from_pretrained(cfg.writer).eval().to(pick_device())
    tokenizer = AutoTokenizer.from_pretrained(resolve(cfg.writer))
    if lm.device.type == "cuda" or fast_bfloat16(torch.cpu.get_capabilities()):
        lm = lm.bfloat16()
    instruction = [{"role": "user", "content": "Write a short story for small children in simple words."}]
    frame = tokenizer.apply_chat_template(instruction, tokenize=False, add_generation_prompt=True)
    number = stories[-1]["batch"] + 1 if stories else 0
    bar = tqdm(total=n, initial=len(stories), disable=None, desc="writing", unit="story")
    while len(stories) < n:
        rng = np.random.default_rng((cfg.seed, number))
        # About one story in twenty is not usable; the last batch is only as large as that requires.
        openings = [opening(lists, rng) for _ in range(min(cfg.batch, 4 + (n - len(stories)) * 5 // 4))]
        generator = torch.Generator(lm.device).manual_seed(int(rng.integers(2**31)))
        new = lm.generate([tokenizer(frame + text)["input_ids"] for text in openings], cfg.max_new_tokens,
                          stop=tuple(tokenizer.all_special_ids), forbid=(), temperature=cfg.temperature,
                          top_k=cfg.top_k, generator=generator)
        tidied = [tidy(text + tokenizer.decode(tokens), cfg.max_sentences) for text, tokens in zip(openings, new)]
        batch = [{"id": f"story{number:04d}_{i:03d}", "batch": number, "sentences": sentences}
                 for i, sentences in enumerate(tidied) if sentences]
        if not batch:
            raise SystemExit(f"{cfg.writer} wrote no usable story in a batch of {cfg.batch}; try another writer, a "
                             f"lower temperature or more max_new_tokens (now {cfg.max_new_tokens})")
        stories += batch
        write_atomic(path, "".join(json.dumps(s) + "\n" for s in stories))
        number += 1
        bar.update(min(len(batch), n - bar.n))
    bar.close()
    return stories[:n]


def speak_stories(cfg: Config, pool, stories: list[dict], split: str, tokenizer: SpeechTokenizer | None) -> None:
    """Stories -> units/<split>, and audio/ with keep_audio; a story that is already there is not spoken again."""
    audio, units = Path(cfg.out) / "audio", Path(cfg.out) / "units" / split
    writer = tokenizer and UnitWriter(units, tokenizer.fingerprint, cfg.out, True, shard_tokens=20_000)
    todo = {story["id"]: story["sentences"] for story in stories
            if (writer and story["id"] not in writer.done)
            or (cfg.keep_audio and not (audio / f"{story['id']}.flac").exists())}
    for id, waves in spoken(cfg, pool, todo, f"speaking {split}"):
        wave = np.concatenate(waves)
        if cfg.keep_audio:
            write_audio(audio / f"{id}.flac", wave)
        if writer and id not in writer.done:
            writer.add(id, *tokenizer.encode(wave, SAMPLE_RATE), text=" ".join(todo[id]))
    if writer and stories:
        writer.flush()
        reader = UnitReader(units)
        print(f"{units}: {len(reader)} stories, {reader.hours:.2f} h, {reader.n_tokens:,} tokens")


def make_pairs(cfg: Config, pool, stories: list[dict], split: str, tokenizer: SpeechTokenizer) -> None:
    """Preference pairs: three sentences of a story; its own fourth sentence is chosen, another story's rejected.

    Both fourth sentences have the same place in their story, so only what they say tells them apart. Prompt, chosen and
    rejected are spoken and tokenised separately, as in SpokenSwag.
    """
    path = Path(cfg.out) / f"pairs_{split}.jsonl"
    if path.exists():
        return
    own = {s["id"]: (s["sentences"][:3], s["sentences"][3]) for s in stories[:cfg.n_pairs]}
    texts = {}
    for id, (prompt, following) in own.items():
        texts |= {f"{id} prompt": prompt, f"{id} next": [following]}
    units = {id: tokenizer.encode(np.concatenate(waves), SAMPLE_RATE)[0].tolist()
             for id, waves in spoken(cfg, pool, texts, f"speaking pairs {split}")}
    write_pairs(path, tokenizer.fingerprint, (
        {"id": id, "prompt": units[f"{id} prompt"], "chosen": units[f"{id} next"], "rejected": units[f"{other} next"],
         "prompt_text": " ".join(own[id][0]), "chosen_text": own[id][1], "rejected_text": own[other][1]}
        for id, other in zip(own, exchange(list(own), cfg.seed)) if id != other))  # equal if there is only one story


# ---------------------------------------------------------------- spoken benchmarks
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


def main(cfg: Config) -> None:
    # ---- the output folder: new, or made by the same settings
    if Path(cfg.swag).suffix != ".jsonl":
        cfg = replace(cfg, tokenizer=cfg.tokenizer or "embedded")
    out, record = Path(cfg.out), Path(cfg.out) / "synth.json"
    if cfg.swag and not Path(cfg.swag).exists():
        raise SystemExit(f"--swag={cfg.swag}: not readable (no such file or folder)")
    if out.is_file() or out.exists() and any(out.iterdir()) and not record.exists():
        raise SystemExit(f"{out} exists and was not made by synth_stories.py; choose another --out")
    if cfg.overwrite:
        empty_folder(out)
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "workers", "overwrite", "keep_audio")}
    settings = json.loads(json.dumps(settings))  # as the file gives them back: tuples become lists
    before = json.loads(record.read_text())["settings"] if record.exists() else {}
    if changed := [f"{k} was {before[k]!r}, now {v!r}" for k, v in settings.items() if before.get(k, v) != v]:
        raise SystemExit(f"{out} was made with other settings ({'; '.join(changed)}); choose another --out, or "
                         f"--overwrite")
    write_atomic(record, json.dumps({"settings": settings, "done": False}, indent=2))

    if cfg.swag:
        # ---- preference pairs of a data set
        from slam.pair_data import make_swag_pairs
        make_swag_pairs(cfg)
    else:
        # ---- stories: written, spoken, tokenised
        stories = write_stories(cfg, cfg.n_val + cfg.n_train)
        splits = {"val": stories[:cfg.n_val], "train": stories[cfg.n_val:]}
        tokenizer = None if cfg.tokenizer == "none" else SpeechTokenizer.load(cfg.tokenizer, pick_device().type)
        with speakers(cfg.tts, cfg.workers) as pool:
            for split, part in splits.items():
                speak_stories(cfg, pool, part, split, tokenizer)
                if tokenizer:
                    make_pairs(cfg, pool, part, split, tokenizer)

            # ---- benchmark pairs of the held-out stories, and of templates
            make_tstorycloze(cfg, pool, splits["val"])
            make_sblimp(cfg, pool)

    write_atomic(record, json.dumps({"settings": settings, "done": True}, indent=2))
    print(f"{out}: done")


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
