"""Text to speech to units: stories written by a text LM, spoken by a TTS; preference pairs and spoken benchmarks.

In:  a text LM, a TTS and a speech tokeniser, by name.
Out: one folder:  stories.jsonl · units/train, units/val (unit files) · pairs_train.jsonl, pairs_val.jsonl ·
     tstorycloze/, sstorycloze/, sblimp/ (wav files, manifest.jsonl) · audio/ (with --keep_audio) · synth.json (its
     settings, done or not)
     With --swag, spoken preference pairs from SWAG's text as in SpokenSwag, and nothing else.

    python synth_stories.py config/demo_stories.py
    python synth_stories.py config/demo_stories.py --out out/big --n_train 5000 --keep_audio
    python synth_stories.py config/spoken_swag.py --swag train.csv      # of SWAG's full set; hours of speaking
    python synth_stories.py config/spoken_swag.py --swag SpokenSwag     # a folder of its parquet files

Three minutes on two CPU cores for the demo's 250 stories (1.6 h of speech), pairs and benchmarks. The same seed
on the same machine gives the same files. Killed, it goes on where it was when started again.
"""
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import load_config
from model import UnitLM
from slam.audio import SAMPLE_RATE
from slam.device import pick_device
from slam.embedded import resolve
from slam.pair_data import SIDES, is_sound, parquet_files, read_slamkit_pairs, read_spoken_swag, read_swag, stored_waves
from slam.slamkit import slamkit_tokenizer
from slam.spoken_pairs import NAMES, exchange, make_sblimp, make_sstorycloze, make_tstorycloze
from slam.tokenizer import SpeechTokenizer
from slam.tts import TTS, kind_of, speakers, spoken, write_audio
from slam.units import UnitReader, UnitWriter, write_pairs


@dataclass
class Config:
    """Write, speak and tokenise stories."""
    out: str = "out/stories"  # folder to write; an interrupted run resumes in it
    writer: str = "embedded:smollm2-135m"  # text LM that writes the stories
    swag: str = ""  # pairs of SWAG, and nothing else, from SWAG's train.csv (that with gold-source and ending0 to 3),
    # from a folder of slprl/SpokenSwag's parquet files, or from SlamKit's .jsonl of pairs with their units
    max_auto_bleu: float = 0.3  # a pair whose prompt and chosen text repeat bigrams as often as this is left out
    tts: str = "hibari"  # what speaks: hibari, kokoro (its package installed) or fastspeech2 (from the hub)
    voices: tuple[str, ...] = ()  # of the TTS; a story or a pair is in one of them; none: stories its first, pairs all
    tokenizer: str = ""  # codebook file, or `embedded`; `none` stops after the audio; empty: `embedded` for audio, and
    # the published mHuBERT-25hz's for SlamKit's .jsonl, which does not name its own
    n_train: int = 400  # stories to train on
    n_val: int = 40  # stories held out: validation units, validation pairs, tStoryCloze pairs
    n_pairs: int = 200  # preference pairs made from the training stories or from SWAG, at most one from each
    n_sblimp: int = 100  # sentence pairs of the sBLIMP-style set
    hard_negatives: bool = False  # make an sStoryCloze-style set, too, whose wrong endings are close; 2 s of a CPU each
    max_new_tokens: int = 80  # the text LM's part of a story, in text tokens
    temperature: float = 0.6  # of the text LM
    top_k: int = 40  # of the text LM
    batch: int = 128  # stories written together
    workers: int = 2  # processes that speak
    keep_audio: bool = False  # keep the spoken stories (16 kHz flac) in audio/
    seed: int = 0  # of everything
    overwrite: bool = False  # start anew instead of resuming

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = []
        if self.tts not in TTS:
            found.append(f"tts = {self.tts!r}: there is {', '.join(TTS)}")
        elif unknown := set(self.voices) - set(TTS[self.tts][1]):
            found.append(f"voices: {self.tts} has {', '.join(TTS[self.tts][1])}, not {', '.join(sorted(unknown))}")
        if self.swag and self.tokenizer == "none":
            found.append("swag: pairs are of units, so a tokenizer is needed")
        if self.tokenizer == "none" and not self.keep_audio:
            found.append("tokenizer = none without keep_audio = true would leave nothing")
        if self.n_val < 4 and not self.swag:
            found.append("n_val: at least 4 stories, so that endings can be exchanged")
        return found


HEROES = """girl|boy|rabbit|bear|fox|cat|dog|mouse|duck|frog|squirrel|lion|elephant|bird|turtle|pig|pony|owl|penguin|
hedgehog|monkey|kitten|puppy|lamb""".replace("\n", "").split("|")


TRAITS = "little kind brave happy curious shy clever funny gentle lonely hungry sleepy small quiet busy silly".split()


PLACES = """a small house by the sea|a big green forest|a quiet village|an old farm|a cave near the river|a tall tree|
a little town|a warm nest|a house on the hill|a garden full of flowers|a snowy valley|a tiny cottage
""".replace("\n", "").split("|")


LOVES = """to play in the park|to sing songs|to look at the stars|to eat apples|to run in the rain|to read books|
to paint pictures|to swim in the lake|to help his friends|to bake bread|to climb trees|to dance|to collect shells|
to fly a kite|to plant flowers|to build towers""".replace("\n", "").split("|")


EVENTS = """found a shiny key|heard a strange noise|lost a red ball|met a new friend|saw a big rainbow|found a map|
woke up very early|got lost in the woods|found a small egg|saw a bird that could not fly|wanted to go on a trip|
heard someone crying|saw dark clouds in the sky|found an old box|fell into the mud|got a letter|saw a boat on the water|
wanted to make a cake|found a hole in the fence|made a big mistake""".replace("\n", "").split("|")


def opening(rng: np.random.Generator) -> str:
    """The first sentences of a story."""
    name, hero, trait, place, love, event = (str(rng.choice(x)) for x in (NAMES, HEROES, TRAITS, PLACES, LOVES, EVENTS))
    article = "an" if trait[0] in "aeiou" else "a"
    love = love.replace("his friends", "friends")
    start = rng.choice(["Once upon a time, there was", "There once was", "Once there was"])
    day = rng.choice(["One day,", "One morning,", "One sunny day,", "One evening,", "Then one day,"])
    return (f"{start} {article} {trait} {hero} named {name}. {name} lived in {place} and loved {love}. "
            f"{day} {name} {event}.")


def split_sentences(text: str) -> list[str]:
    """split_sentences('Hi. "Go!" He ran') -> ['Hi.', '"Go!"'] (whole sentences only)"""
    return re.findall(r'\S.*?[.!?]+["\']?(?=\s|$)', text)


def tidy(text: str) -> list[str] | None:
    """The whole sentences of a written story, at most 7; None if it is too short, odd to speak, or repeats itself."""
    text = text.translate(str.maketrans("“”‘’—–\n", "\"\"''-- "))
    sentences = split_sentences(re.sub(r"\s+", " ", text))[:7]
    words = re.findall(r"[a-z']+", " ".join(sentences).lower())
    bigrams = list(zip(words, words[1:]))
    fine = (len(sentences) >= 5 and all(2 <= len(s.split()) <= 25 for s in sentences)
            and len(set(sentences)) == len(sentences) and len(set(bigrams)) > 0.75 * len(bigrams)
            and re.fullmatch(r"[A-Za-z0-9 ,.!?'\"-]+", " ".join(sentences)))
    return sentences if fine else None


def write_stories(cfg: Config, n: int) -> list[dict]:
    """n stories [{"id", "sentences"}], kept in stories.jsonl batch by batch; a batch depends on (seed, its number)."""
    path = Path(cfg.out) / "stories.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    stories = [json.loads(line) for line in lines]
    if len(stories) >= n:
        return stories[:n]
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(resolve(cfg.writer))
    lm = UnitLM.from_pretrained(cfg.writer).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if lm.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        lm = lm.bfloat16()
    number = stories[-1]["batch"] + 1 if stories else 0
    instruction = [{"role": "user", "content": "Write a short story for small children in simple words."}]
    frame = tokenizer.apply_chat_template(instruction, tokenize=False, add_generation_prompt=True)
    bar = tqdm(total=n, initial=len(stories), disable=None, desc="writing", unit="story")
    while len(stories) < n:
        rng = np.random.default_rng((cfg.seed, number))
        # About one story in eight is not usable; the last batch is no larger than that asks for.
        openings = [opening(rng) for _ in range(min(cfg.batch, 4 + (n - len(stories)) * 5 // 4))]
        generator = torch.Generator(lm.device).manual_seed(int(rng.integers(2**31)))
        new = lm.generate([tokenizer(frame + text)["input_ids"] for text in openings], cfg.max_new_tokens,
                          temperature=cfg.temperature, top_k=cfg.top_k, stop=(tokenizer.eos_token_id, 0), forbid=(),
                          generator=generator)
        tidied = [tidy(text + tokenizer.decode(tokens)) for text, tokens in zip(openings, new)]
        batch = [{"id": f"story{number:04d}_{i:03d}", "batch": number, "sentences": sentences}
                 for i, sentences in enumerate(tidied) if sentences]
        if not batch:
            raise SystemExit(f"{cfg.writer} wrote no usable story in a batch of {cfg.batch}; try another writer, a "
                             f"lower temperature or more max_new_tokens (now {cfg.max_new_tokens})")
        stories += batch
        temporary = path.with_suffix(".part")
        temporary.write_text("".join(json.dumps(s) + "\n" for s in stories), encoding="utf-8")
        os.replace(temporary, path)
        number += 1
        bar.update(min(len(batch), n - bar.n))
    bar.close()
    return stories[:n]


# ---------------------------------------------------------------- units, pairs, benchmarks
def speak_stories(cfg: Config, pool, stories: list[dict], split: str, tokenizer: SpeechTokenizer | None) -> None:
    """Stories -> units/<split>, and audio/ if asked for; a story already there is not spoken again."""
    audio = Path(cfg.out) / "audio"
    writer = tokenizer and UnitWriter(Path(cfg.out) / "units" / split, tokenizer.fingerprint, cfg.out,
                                      shard_tokens=20_000)
    todo = {story["id"]: story["sentences"] for story in stories
            if (writer and story["id"] not in writer.done)
            or (cfg.keep_audio and not (audio / f"{story['id']}.flac").exists())}
    for id, waves in spoken(cfg, pool, todo, f"speaking {split}") if todo else ():
        wave = np.concatenate(waves)
        if cfg.keep_audio:
            write_audio(audio / f"{id}.flac", wave)
        if writer and id not in writer.done:
            writer.add(id, *tokenizer.encode(wave, SAMPLE_RATE), text=" ".join(todo[id]))
    if writer:
        writer.flush()


def make_pairs(cfg: Config, pool, stories: list[dict], split: str, tokenizer: SpeechTokenizer) -> None:
    """Preference pairs: a story's beginning; its own next sentence against one of another story.

    Prompt, chosen and rejected are spoken and tokenised each by itself, as SpokenSwag is.
    """
    path = Path(cfg.out) / f"pairs_{split}.jsonl"
    if path.exists():
        return
    # Fourth sentences of different stories are exchanged: only what they say tells them apart.
    own = {s["id"]: (s["sentences"][:3], s["sentences"][3]) for s in stories[:cfg.n_pairs]}
    ids, texts = list(own), {}
    for id in ids:
        texts |= {f"{id} prompt": own[id][0], f"{id} next": [own[id][1]]}
    units = {id: tokenizer.encode(np.concatenate(waves), SAMPLE_RATE)[0].tolist()
             for id, waves in spoken(cfg, pool, texts, f"speaking pairs {split}")}
    pairs = []
    for id, other in zip(ids, exchange(ids, cfg.seed)):
        pairs.append({"id": id, "prompt": units[f"{id} prompt"], "chosen": units[f"{id} next"],
                      "rejected": units[f"{other} next"], "prompt_text": " ".join(own[id][0]),
                      "chosen_text": own[id][1], "rejected_text": own[other][1]})
    write_pairs(path, tokenizer.fingerprint, pairs)


def tokenize_pairs(pairs: list[dict], path: Path, tokenizer: SpeechTokenizer, say: Callable) -> int:
    """Write a pair file: what `say(todo)`, todo {id: pair}, yields as (id and side, [wave]), each tokenised by itself.

    Pairs are kept as they come, so that a killed run goes on with the next. Returns how many gave no units.
    """
    if path.exists():
        return 0
    kept = path.with_name(path.name + ".kept")
    lines = kept.read_text(encoding="utf-8").split("\n")[:-1] if kept.exists() else []  # a kill may have cut the last
    kept.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    done = {json.loads(line)["id"] for line in lines}
    todo = {p["id"]: p for p in pairs if p["id"] not in done}
    with open(kept, "a", encoding="utf-8") as f:
        said = iter(say(todo) if todo else ())
        while batch := list(islice(said, 3 * 16)):  # whole pairs, tokenised together
            waves = {name: wave for name, (wave,) in batch}
            sound = {name: wave for name, wave in waves.items() if is_sound(wave)}
            units = dict(zip(sound, (u.tolist() for u, _ in tokenizer.encode_batch(list(sound.values())))))
            for id in dict.fromkeys(name.rpartition(" ")[0] for name in waves):
                own = {side: units.get(f"{id} {side}") for side in SIDES}
                f.write(json.dumps(todo[id] | own, ensure_ascii=False) + "\n")
            f.flush()
    found = [json.loads(line) for line in kept.read_text(encoding="utf-8").split("\n")[:-1]]
    whole = [p for p in found if all(p[side] for side in SIDES)]
    write_pairs(path, tokenizer.fingerprint, whole)
    kept.unlink()
    return len(found) - len(whole)


def make_swag_pairs(cfg: Config, pool, tokenizer: SpeechTokenizer | None) -> None:
    """pairs_val.jsonl, of `n_val` rows drawn by the seed, and pairs_train.jsonl, of at most `n_pairs` others.

    Of a data set with a validation split, from that. tokenizer: None for SlamKit's pairs, which have units.
    """
    kind = kind_of(cfg.swag)
    if kind == "parquet":
        pairs, skipped = read_spoken_swag(cfg.swag, cfg)
    elif kind == "jsonl":
        fingerprint, base, _ = slamkit_tokenizer(cfg.swag, cfg.tokenizer)
        if fingerprint != base:
            raise SystemExit(f"{cfg.swag} has units, and {cfg.tokenizer} makes pieces of several; name the codebook")
        pairs, skipped = read_slamkit_pairs(cfg.swag, cfg, fingerprint.n_units)
    else:
        pairs, skipped = read_swag(cfg.swag, cfg)

    def say(todo: dict[str, dict]):
        if kind == "parquet":
            bar = tqdm(total=len(todo), disable=None, desc="tokenising", unit="pair")
            for i, found in enumerate(stored_waves(parquet_files(cfg.swag), todo)):
                yield found
                bar.update(i % 3 == 2)
            return
        texts = {f"{id} {side}": [p[f"{side}_text"]] for id, p in todo.items() for side in SIDES}
        yield from spoken(cfg, pool, texts, "speaking pairs",
                          {name: todo[name.rpartition(" ")[0]]["speaker"] for name in texts})

    splits = [p.pop("split", "") for p in pairs]
    order = np.random.default_rng(cfg.seed).permutation(len(pairs))
    own = "val" in splits and "train" in splits
    val = [i for i in order if not own or splits[i] == "val"][:cfg.n_val]
    train = [i for i in order if splits[i] == "train"] if own else order[len(val):]
    if len(val) < cfg.n_val or not len(train):
        raise SystemExit(f"{cfg.swag}: {len(pairs)} usable rows ({dict(skipped)}); more than n_val, {cfg.n_val}, are "
                         f"needed")
    for split, part in (("val", val), ("train", train[:cfg.n_pairs])):
        path, part, silent = Path(cfg.out) / f"pairs_{split}.jsonl", [pairs[i] for i in sorted(part)], 0
        if kind != "jsonl":
            silent = tokenize_pairs(part, path, tokenizer, say)
        elif not path.exists():
            write_pairs(path, fingerprint, part)
        print(f"{path}: {len(part) - silent:,} pairs; {silent} gave no sound")
    print(f"{cfg.swag}: {len(pairs) + skipped.total():,} rows, of which were skipped: "
          + (", ".join(f"{n:,} {why}" for why, n in skipped.items()) or "none"))


def main(cfg: Config) -> None:
    if kind_of(cfg.swag) != "jsonl":
        cfg = replace(cfg, tokenizer=cfg.tokenizer or "embedded")
    out, record = Path(cfg.out), Path(cfg.out) / "synth.json"
    if cfg.swag and not Path(cfg.swag).exists():
        raise SystemExit(f"--swag={cfg.swag}: not readable (no such file or folder)")
    if out.exists() and any(out.iterdir()) and not record.exists():
        raise SystemExit(f"{out} exists and was not made by synth_stories.py; choose another --out")
    if cfg.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    # What decides the files; a folder made with other settings is not resumed.
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "workers", "overwrite")}
    settings = json.loads(json.dumps(settings))  # as the file gives them back: tuples are lists there
    if record.exists():
        before = json.loads(record.read_text())["settings"]
        changed = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k, v) != v]
        if changed:
            raise SystemExit(f"{out} was made with other settings ({'; '.join(changed)}); choose another --out, or "
                             f"--overwrite")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"settings": settings, "done": False}, indent=2))

    no_audio = cfg.tokenizer == "none" or kind_of(cfg.swag) == "jsonl"
    tokenizer = None if no_audio else SpeechTokenizer.load(cfg.tokenizer, pick_device().type)
    stories = [] if cfg.swag else write_stories(cfg, cfg.n_val + cfg.n_train)
    splits = {} if cfg.swag else {"val": stories[:cfg.n_val], "train": stories[cfg.n_val:]}
    with speakers(cfg) as pool:
        if cfg.swag:
            make_swag_pairs(cfg, pool, tokenizer)
        for split, part in splits.items():
            speak_stories(cfg, pool, part, split, tokenizer)
            if tokenizer:
                make_pairs(cfg, pool, part, split, tokenizer)
        if not cfg.swag:
            make_tstorycloze(cfg, pool, splits["val"])
            if cfg.hard_negatives:
                make_sstorycloze(cfg, pool, splits["val"])
            make_sblimp(cfg, pool)

    record.write_text(json.dumps({"settings": settings, "done": True}, indent=2))
    for split in splits if tokenizer else ():
        reader = UnitReader(out / "units" / split)
        print(f"{out}/units/{split}: {len(reader)} stories, {reader.hours:.2f} h, {reader.n_tokens:,} tokens")
    print(f"{out}: done")


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
