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
import contextlib
import csv
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Callable

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from audio import SAMPLE_RATE, check_wave, load_audio, read_parquet, resample
from config import load_config
from embedded import resolve
from eval import auto_bleu, continuation_scores
from model import UnitLM
from prepare_units import slamkit_tokenizer, slamkit_units
from speech_tokenizer import SpeechTokenizer
from train import pick_device
from units import UnitReader, UnitWriter, write_pairs


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


# ---------------------------------------------------------------- writing

# A story opens with two or three sentences drawn from these lists and is continued by the text LM: an opening keeps a
# small LM on its rails, and the product of the lists keeps the openings from repeating.
NAMES = """Lily Tom Mia Ben Sue Max Anna Jack Lucy Sam Ella Tim Rosie Leo Amy Finn Zoe Pip Daisy Oscar Nora Bobby Grace
Henry Ruby Charlie Molly George Kitty Peter Sally Rex Bella Toby Clara Milo Polly Hugo Ivy Felix""".split()
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


# ---------------------------------------------------------------- speaking

def load_hibari():
    """hibari (Apache-2.0): one American English voice; (text, seed, voice) -> float32 at 24 kHz."""
    try:
        from hibari import Hibari
    except ImportError:
        raise SystemExit("hibari-tts is not installed: pip install --no-deps -r requirements-embedded.txt") from None
    voice = Hibari(threads=1)
    return lambda text, seed, _: (voice(text, seed=seed), voice.sample_rate)


def load_kokoro():
    """Kokoro-82M (Apache-2.0) by its package, which fetches it from the hub: SpokenSwag's four voices, 24 kHz."""
    try:
        from kokoro import KPipeline
    except ImportError:
        raise SystemExit("kokoro is not installed: pip install kokoro") from None
    pipeline = functools.cache(lambda language: KPipeline(lang_code=language))  # a: American, b: British
    return lambda text, seed, voice: (np.concatenate(
        [np.zeros(0, np.float32)] + [np.asarray(audio) for *_, audio in pipeline(voice[0])(text, voice=voice)]), 24_000)


def load_fastspeech2():
    """FastSpeech2Conformer with HiFi-GAN (ESPnet, LJSpeech) from the hub, by transformers; needs g2p_en; 22.05 kHz."""
    from transformers import FastSpeech2ConformerTokenizer, FastSpeech2ConformerWithHifiGan
    try:
        tokenizer = FastSpeech2ConformerTokenizer.from_pretrained("espnet/fastspeech2_conformer")
        model = FastSpeech2ConformerWithHifiGan.from_pretrained("espnet/fastspeech2_conformer_with_hifigan").eval()
    except (OSError, ImportError) as e:
        raise SystemExit(f"fastspeech2 can't be loaded: {e}") from None

    @torch.inference_mode()
    def speak(text: str, seed: int, voice: str) -> tuple[np.ndarray, int]:
        return model(tokenizer(text, return_tensors="pt")["input_ids"]).waveform[0].numpy(), 22_050

    return speak


SIDES = ("prompt", "chosen", "rejected")
# name -> (() -> (text, seed, voice) -> (wave, sample rate), voices)
TTS = {"hibari": (load_hibari, ("american",)),
       "kokoro": (load_kokoro, ("af_heart", "am_fenrir", "bf_emma", "bm_george")),
       "fastspeech2": (load_fastspeech2, ("ljspeech",))}
_speak = None  # a worker process's voice


def _start_worker(tts: str) -> None:
    global _speak
    _speak = TTS[tts][0]()


def speak(job: tuple[list[str], int, str]) -> list[np.ndarray]:
    """Sentences -> waves at 16 kHz, each padded to whole frames (40 ms) so that sentence borders are frame borders."""
    sentences, seed, voice = job
    waves = []
    for i, sentence in enumerate(sentences):
        wave = resample(*(_speak(sentence, seed + i, voice)), SAMPLE_RATE)
        waves.append(np.pad(wave, (0, -len(wave) % 640)).astype(np.float32))
    return waves


@contextlib.contextmanager
def speakers(cfg: Config):
    """A pool of processes that speak; None where all has been said already. SystemExit if the TTS can't be loaded."""
    if kind_of(cfg.swag) in ("parquet", "jsonl"):
        yield None
        return
    TTS[cfg.tts][0]()  # what it lacks is said here, and once
    # spawn, not fork: a forked child of a process that has run torch's threads may hang
    with multiprocessing.get_context("spawn").Pool(cfg.workers, _start_worker, (cfg.tts,)) as pool:
        yield pool


def spoken(cfg: Config, pool, texts: dict[str, list[str]], desc: str, voices: dict[str, str] | None = None):
    """Yield (id, sentence waves) of each text in order, spoken by the pool's processes; seeded by (seed, id).

    voices: {id: voice}; without, all are in the first.
    """
    first = (cfg.voices or TTS[cfg.tts][1])[0]
    jobs = [(sentences, zlib.crc32(f"{cfg.seed} {id}".encode()), voices[id] if voices else first)
            for id, sentences in texts.items()]
    parts = (jobs[at:at + 512] for at in range(0, len(jobs), 512))  # lest waves pile up that nobody takes
    waves = (wave for part in parts for wave in pool.imap(speak, part, chunksize=2))
    waves = tqdm(waves, total=len(jobs), disable=None, desc=desc, unit="text")
    yield from ((id, w) for w, id in zip(waves, texts))  # in this order zip exhausts the bar


def write_audio(path: Path, wave: np.ndarray) -> None:
    """Write a wave (T,) at 16 kHz; a file that has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    soundfile.write(temporary, wave, SAMPLE_RATE, format=path.suffix[1:].upper())
    os.replace(temporary, path)


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


def read_swag(path: str, cfg: Config) -> tuple[list[dict], Counter]:
    """SWAG's original CSV -> texts of preference pairs, as SpokenSwag has them, and the rows skipped, by reason.

    Of gold rows, prompt is sent1, chosen sent2 with the right ending, rejected sent2 with a wrong one drawn by (seed,
    row). A pair stays if the bigram auto-BLEU of "prompt chosen" is below `max_auto_bleu`. SystemExit if it is no such
    file.
    """
    columns = ["sent1", "sent2", "gold-source", "ending0", "ending1", "ending2", "ending3", "label"]
    pairs, skipped = [], Counter()
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = csv.DictReader(f, strict=True)
            if missing := [c for c in columns if c not in (rows.fieldnames or ())]:
                raise SystemExit(f"{path}: no column {', '.join(missing)}; it wants SWAG's full train.csv or val.csv")
            for number, row in enumerate(rows):
                prompt, start, source, *endings, label = (" ".join((row[c] or "").split()) for c in columns)
                if source != "gold":
                    skipped["not gold"] += 1
                    continue
                if not (prompt and start and all(endings)) or label not in ("0", "1", "2", "3") or None in row:
                    skipped["malformed"] += 1
                    continue
                rng = np.random.default_rng((cfg.seed, number))
                right, (*wrong,) = endings[int(label)], (e for i, e in enumerate(endings) if i != int(label))
                chosen, rejected = f"{start} {right}", f"{start} {wrong[rng.integers(3)]}"
                if chosen == rejected:
                    skipped["with a wrong ending that is the right one"] += 1
                    continue
                if auto_bleu(f"{prompt} {chosen}") >= cfg.max_auto_bleu:
                    skipped["repetitive"] += 1
                    continue
                voice = str(rng.choice(cfg.voices or TTS[cfg.tts][1]))
                pairs.append({"id": f"swag{number:06d}", "speaker": voice, "prompt_text": prompt, "chosen_text": chosen,
                              "rejected_text": rejected})
    except OSError as e:
        raise SystemExit(f"--swag={path}: not readable ({e.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as e:
        raise SystemExit(f"{path}: row {len(pairs) + skipped.total() + 2}: not CSV ({e})") from None
    return pairs, skipped


def read_spoken_swag(input: str, cfg: Config) -> tuple[list[dict], Counter]:
    """Hugging Face's slprl/SpokenSwag, a folder of its parquet files or one: texts of pairs, and the rows skipped.

    A pair's "split" is that of its file's name or folder. It stays if its `auto_bleu2`, or where it has none that of
    "prompt chosen", is below `max_auto_bleu`. SystemExit if it is no such file, or pyarrow is not there.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SystemExit(f"{input}: reading parquet needs pyarrow: pip install pyarrow") from None
    pairs, skipped = [], Counter()
    for path, name in parquet_files(input):
        try:
            names = parquet.read_schema(path).names
            if missing := {x for side in SIDES for x in (side, f"{side}_text")} - set(names):
                raise SystemExit(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(names)}")
            columns = [f"{side}_text" for side in SIDES] + [x for x in ("speaker", "auto_bleu2") if x in names]
            rows = parquet.read_table(path, columns=columns).to_pylist()
        except (OSError, ValueError) as e:  # pyarrow's own are of these
            raise SystemExit(f"{path}: not a whole parquet file ({str(e).splitlines()[0]})") from None
        split = "val" if re.search(r"\b(val|test|dev)", name) else "train"
        for number, row in enumerate(rows):
            value = row.pop("auto_bleu2", None)
            if value is None:
                value = auto_bleu(f"{row['prompt_text']} {row['chosen_text']}")
            if value >= cfg.max_auto_bleu:
                skipped["repetitive"] += 1
            else:
                pairs.append({"id": f"{name}/{number:07d}", "split": split} | row)
    return pairs, skipped


def parquet_files(input: str) -> list[tuple[Path, str]]:
    """Parquet files of a folder, or one, each with what it is called there: default/train/0000."""
    if not Path(input).is_dir():
        return [(Path(input), Path(input).stem)]
    return [(p, p.relative_to(input).with_suffix("").as_posix()) for p in sorted(Path(input).rglob("*.parquet"))]


def read_slamkit_pairs(path: str, cfg: Config, n_units: int) -> tuple[list[dict], Counter]:
    """SlamKit's preference features, JSON lines of prompt, chosen and rejected with their units: pairs, rows skipped.

    {"prompt": {"units", "duration"}, "chosen": …, "rejected": …, "prompt_text", …}; also with "audio_repr" around the
    units, as its documentation has it.
    """
    pairs, skipped = [], Counter()
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f):
                row = json.loads(line)
                texts = {k: row[k] for side in SIDES if (k := f"{side}_text") in row}
                if auto_bleu(f"{texts.get('prompt_text', '')} {texts.get('chosen_text', '')}") >= cfg.max_auto_bleu:
                    skipped["repetitive"] += 1
                    continue
                units = {side: slamkit_units(row[side], n_units)[0].tolist() for side in SIDES}
                pairs.append({"id": f"{Path(path).stem}/{number:07d}"} | units | texts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"{path}: line {len(pairs) + skipped.total() + 1}: not a pair with units ({e!r}), as "
                         f"SlamKit's preference_alignment_feature_extractor writes them") from None
    return pairs, skipped


def stored_waves(files: list[tuple[Path, str]], wanted: dict[str, dict]):
    """Yield (id and side, [wave]) of parquet files' rows; a wave of no samples for one that can't be read."""
    for path, name in files:
        prefix = f"{name}/"
        columns = [read_parquet(str(path), prefix, False, side, lambda id: id[:len(prefix) + 7] in wanted)
                   for side in SIDES]
        for items in zip(*columns):
            for side, item in zip(SIDES, items):
                if item.fatal:
                    raise SystemExit(f"{path}: {item.problem}")
                with contextlib.suppress(ValueError):
                    yield f"{item.id[:len(prefix) + 7]} {side}", [load_audio(item.source, item.id)]
                    continue
                yield f"{item.id[:len(prefix) + 7]} {side}", [np.zeros(0, np.float32)]


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


def is_sound(wave: np.ndarray) -> bool:
    with contextlib.suppress(ValueError):
        check_wave(wave)
        return True
    return False


def kind_of(swag: str) -> str:
    """parquet (audio), jsonl (units) or csv (text); empty for nothing."""
    return "parquet" if swag and Path(swag).is_dir() else Path(swag).suffix[1:]


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


def exchange(items: list, seed: int) -> list:
    """A seeded permutation in which nothing stays in its place."""
    order = np.random.default_rng(seed).permutation(len(items))
    out = [None] * len(items)
    for i, j in zip(order, np.roll(order, 1)):
        out[i] = items[j]
    return out


def write_benchmark(cfg: Config, pool, name: str, pairs: list[dict], texts: dict[str, list[str]], recipe) -> None:
    """Speak `texts`, write each pair's two wavs (`recipe(pair, side)` -> ids of texts to join) and manifest.jsonl."""
    folder = Path(cfg.out) / name
    if (folder / "manifest.jsonl").exists():
        return
    waves = dict(spoken(cfg, pool, texts, f"speaking {name}"))
    lines = []
    for pair in pairs:
        for side in ("positive", "negative"):
            pair[side] = f"{pair['id']}_{side}.wav"
            write_audio(folder / pair[side], np.concatenate([w for id in recipe(pair, side) for w in waves[id]]))
        lines.append(json.dumps(pair) + "\n")
    folder.mkdir(parents=True, exist_ok=True)  # of no pairs nothing was written
    (folder / "manifest.part").write_text("".join(lines))
    os.replace(folder / "manifest.part", folder / "manifest.jsonl")


def make_tstorycloze(cfg: Config, pool, stories: list[dict]) -> None:
    """tStoryCloze-style pairs: four sentences and their true fifth, against the fifth of another story."""
    texts, pairs = {}, []
    for story, other in zip(stories, exchange(stories, cfg.seed)):
        id, (*beginning, ending) = story["id"], story["sentences"][:5]
        texts |= {f"{id} beginning": beginning, f"{id} ending": [ending]}
        pairs.append({"id": id, "other": other["id"], "positive_text": " ".join(story["sentences"][:5]),
                      "negative_text": " ".join([*beginning, other["sentences"][4]])})
    write_benchmark(cfg, pool, "tstorycloze", pairs, texts, lambda pair, side: [
        f"{pair['id']} beginning", f"{pair['id'] if side == 'positive' else pair['other']} ending"])


def things(text: str) -> set[str]:
    """Words that say what a text is about, roughly: the longer ones, names aside."""
    return {word.lower() for word in re.findall(r"\w{4,}", text) if word not in NAMES}


def pronouns(text: str) -> set[str]:
    """Of which sexes the third persons of a text are."""
    return {sex for sex in ("he|him|his", "she|her|hers") if re.search(rf"\b({sex})\b", text, re.IGNORECASE)}


def make_sstorycloze(cfg: Config, pool, stories: list[dict], n_candidates: int = 6, min_gap: float = 0.3) -> None:
    """sStoryCloze-style pairs: four sentences and their true fifth, against a close one that fits less.

    The wrong ending is another story's, with this one's name and no other pronouns in it, that shares the rarest words
    with this story and that the writer finds at least `min_gap` nats per token less likely here. None is used twice; a
    story for which there is none is left out.
    """
    if (Path(cfg.out) / "sstorycloze" / "manifest.jsonl").exists():
        return
    beginnings, endings = [" ".join(s["sentences"][:4]) for s in stories], [s["sentences"][4] for s in stories]
    about, said = list(map(things, beginnings)), list(map(things, endings))
    found_in = Counter(word for words in about for word in words)
    todo, offered = [], Counter()  # of each story: endings that are close to it, the closest first
    for i, beginning in enumerate(beginnings):
        name = next((word for word in re.findall(r"\w+", beginning) if word in NAMES), None)
        shared = [sum(math.log(len(stories) / found_in[word]) for word in about[i] & words) for words in said]
        fine = [j for j, ending in enumerate(endings) if name and ending != endings[i] and shared[j] > 0
                and offered[j] < n_candidates and pronouns(ending) <= pronouns(f"{beginning} {endings[i]}")]
        fine = sorted(fine, key=lambda j: -shared[j])[:n_candidates]
        offered.update(fine)  # the same ones suit many stories; enough must be left for the last
        todo.append([(j, re.sub(r"\w+", lambda m: name if m[0] in NAMES else m[0], endings[j])) for j in fine])
    asked = [(beginnings[i], x) for i, others in enumerate(todo) for x in (endings[i], *(x for _, x in others))]
    scores = iter(continuation_scores(*map(list, zip(*asked)), cfg.writer))
    texts, pairs, used = {}, [], set()
    for story, beginning, ending, others in zip(stories, beginnings, endings, todo):
        true, *theirs = [next(scores) for _ in range(1 + len(others))]
        wrong = next((x for x, score in zip(others, theirs) if score <= true - min_gap and x[0] not in used), None)
        if wrong:
            id, (j, worse) = story["id"], wrong
            used.add(j)
            texts |= {f"{id} beginning": story["sentences"][:4], f"{id} positive": [ending], f"{id} negative": [worse]}
            pairs.append({"id": id, "positive_text": f"{beginning} {ending}", "negative_text": f"{beginning} {worse}"})
    print(f"sstorycloze: {len(pairs)} pairs; {len(stories) - len(pairs)} stories have no close ending that fits less")
    write_benchmark(cfg, pool, "sstorycloze", pairs, texts, lambda pair, side: [
        f"{pair['id']} beginning", f"{pair['id']} {side}"])


def grammar_pair(kind: str, i: int, rng: np.random.Generator) -> tuple[str, str]:
    """A grammatical and an ungrammatical sentence of the same words' kinds; i alternates what is right.

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


def make_sblimp(cfg: Config, pool) -> None:
    """sBLIMP-style pairs: a grammatical and an ungrammatical sentence, by templates, the four kinds in equal shares."""
    rng, pairs, seen = np.random.default_rng((cfg.seed, 1)), [], set()
    for i in range(cfg.n_sblimp):
        kind = GRAMMAR[i % len(GRAMMAR)]
        for _ in range(1000):
            positive, negative = grammar_pair(kind, i // len(GRAMMAR), rng)
            if (positive, negative) not in seen:
                break
        else:
            raise SystemExit(f"n_sblimp: the templates give some {len(pairs):,} different pairs, not {cfg.n_sblimp:,}")
        seen.add((positive, negative))
        pairs.append({"id": f"{i:05d}", "type": kind, "positive_text": positive, "negative_text": negative})
    texts = {f"{p['id']} {side}": [p[f"{side}_text"]] for p in pairs for side in ("positive", "negative")}
    write_benchmark(cfg, pool, "sblimp", pairs, texts, lambda pair, side: [f"{pair['id']} {side}"])


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
