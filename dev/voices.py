"""Speech unlike the stories: people's, random words to train the vocoder on, other voices to train the unit LM on.

    python dev/voices.py people                             # out/people/telephone, out/people/audiobook: from Debian
    python eval.py --resynth_from out/people/telephone
    python dev/voices.py words                              # out/words/audio: 2 h in the TTS' voice; one minute
    python dev/voices.py examples                           # out/examples: 7.5 h of WordNet's sentences; three minutes
    python dev/voices.py others --stories=out/mini/part0    # units of stories that other voices begin; 15 minutes
    python dev/voices.py flite --set=out/mini/part0/tstorycloze    # out/people/slt: the pairs in a voice of flite

No random word predicts the next, so a vocoder learns to trust the units and not what stories tend to say; WordNet's
sentences, its examples of how a word is used, are about anything. Stories that another voice begins and the TTS' voice
continues were meant to teach the unit LM to understand a person's prompt; docs/mini.md has the result.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import json
import re
import shutil
import subprocess
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Literal

import numpy as np
from tqdm import tqdm

from config import load_config
from slam.audio import SAMPLE_RATE, load_audio, resample
from slam.benchmarks import SIDES, read_manifest
from slam.device import pick_device
from slam.embedded import resolve
from slam.tokenizer import SpeechTokenizer
from slam.tts import speakers, spoken, write_audio
from slam.units import UnitReader, UnitWriter, write_atomic

PEOPLE = {"telephone": ("asterisk-core-sounds-en-wav", "usr/share/asterisk/sounds"),  # a woman's prompts, 8 kHz
          "audiobook": ("pocketsphinx-testdata", "usr/share/pocketsphinx/test/data/librivox")}  # five sentences


@dataclass
class PeopleConfig:
    """Fetch people's recordings: telephone prompts and audiobook sentences (Debian packages)."""
    out: str = "out/people"  # folder to write
    sets: tuple[Literal["telephone", "audiobook"], ...] = ("telephone", "audiobook")  # what to fetch
    min_seconds: float = 2.9  # recordings at least this long (and at most 30 s); shorter ones have few words


@dataclass
class WordsConfig:
    """Speak sentences of random words."""
    out: str = "out/words/audio"  # folder to write; what is there is not spoken again
    recordings: int = 440  # of four sentences each
    tts: str = "hibari"  # a name in slam/tts.py
    voices: tuple[str, ...] = ()  # of the TTS; the first one speaks
    workers: int = 2  # processes that speak
    seed: int = 0


@dataclass
class ExamplesConfig(WordsConfig):
    """Speak sentences that WordNet has as examples (a Debian package)."""
    out: str = "out/examples"  # folder to write; what is there is not spoken again
    recordings: int = 3600  # of one to four sentences each


@dataclass
class OthersConfig:
    """Units of stories that another voice begins and the TTS' voice continues; a killed run can be continued."""
    stories: str = "out/mini/part0"  # folder of synth_stories.py, whose training stories are spoken again
    out: str = "out/mini/others/units"  # folder to write
    copies: int = 2  # of each story, each begun in another voice
    all: float = 0.3  # share of the copies that the other voice speaks to their end
    workers: int = 2  # processes that speak


@dataclass
class FliteConfig:
    """Speak a set of pairs in a voice of flite (Debian), which no part was fitted on."""
    set: str = "out/mini/part0/tstorycloze"  # folder with a manifest.jsonl that has the pairs' texts
    voice: Literal["slt", "rms", "awb"] = "slt"  # of flite: a woman, two men
    out: str = "out/people"  # folder to write OUT/VOICE
    workers: int = 2  # processes that speak


def unpack(package: str, folder: Path) -> None:
    """Download a Debian package and unpack it in a folder; nothing is installed. SystemExit if that fails."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            subprocess.run(["apt-get", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "download",
                            package], cwd=temporary, check=True, capture_output=True, timeout=600)
            for file in Path(temporary).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", file, folder], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as e:
            said = (getattr(e, "stderr", None) or b"").decode().strip()
            raise SystemExit(f"{package}: can't be had ({said or e}); on Debian or Ubuntu with a network, `apt-get "
                             f"update` may help") from None


def people(cfg: PeopleConfig) -> None:
    """Write OUT/telephone/*.wav and OUT/audiobook/*.wav."""
    for name in cfg.sets:
        package, folder = PEOPLE[name]
        out = Path(cfg.out, name)
        with tempfile.TemporaryDirectory() as temporary:
            unpack(package, Path(temporary))
            out.mkdir(parents=True, exist_ok=True)
            found = sorted(Path(temporary, folder).rglob("*.wav"))
            for file in (f for f in found if f.parent.name != "silence"):
                if cfg.min_seconds <= len(load_audio(file)) / SAMPLE_RATE <= 30:
                    shutil.copy(file, out / f"{file.parent.name}_{file.name}")
        print(f"{out}: {len(list(out.glob('*.wav')))} recordings")


def word_texts(n: int, seed: int) -> dict[str, list[str]]:
    """{id: four sentences of 6 to 12 words}, of Whisper's 7,000 commonest words and pieces of words."""
    vocabulary = json.loads(Path(resolve("embedded:whisper-tiny.en"), "tokenizer.json").read_text())["model"]["vocab"]
    words = [w[1:] for w, i in sorted(vocabulary.items(), key=lambda item: item[1])
             if i < 16_000 and re.fullmatch("Ġ([a-z]{2,}|a|I)", w)]  # Ġ is the space before a word
    rng = np.random.default_rng(seed)
    return {f"{i:05d}": [" ".join(rng.choice(words, rng.integers(6, 13))).capitalize() + "." for _ in range(4)]
            for i in range(n)}


def example_texts(n: int, seed: int) -> dict[str, list[str]]:
    """{id: one to four sentences of 5 to 16 words} from WordNet 3.0's glosses, none twice; some 11,000 recordings."""
    with tempfile.TemporaryDirectory() as folder:
        unpack("wordnet-base", Path(folder))
        glosses = [line.partition("| ")[2] for file in sorted(Path(folder, "usr/share/wordnet").glob("data.*"))
                   for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]
    found = {}
    for text in (quoted for gloss in glosses for quoted in re.findall(r'"([^"]+)"', gloss)):
        if re.fullmatch(r"[A-Za-z][A-Za-z ',;-]+[.!?]?", text) and 5 <= len(text.split()) <= 16:
            found[text[0].upper() + text[1:] + "." * (text[-1] not in ".!?")] = True
    rng = np.random.default_rng(seed)
    sentences = iter(rng.permutation(list(found)).tolist())
    texts = {f"w{i:05d}": list(islice(sentences, int(rng.integers(1, 5)))) for i in range(n)}
    return {id: text for id, text in texts.items() if text}


def words(cfg: WordsConfig) -> None:
    """Write OUT/ID.flac."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = (example_texts if isinstance(cfg, ExamplesConfig) else word_texts)(cfg.recordings, cfg.seed)
    todo = {id: text for id, text in texts.items() if not (out / f"{id}.flac").exists()}
    with speakers(cfg.tts, cfg.workers) as pool:
        for id, waves in spoken(cfg, pool, todo, "speaking"):
            write_audio(out / f"{id}.flac", np.concatenate(waves))
    print(f"{out}: {len(texts)} recordings")


def another_voice(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A wave (T,) at 16 kHz as if another speaker had recorded it elsewhere: (T / r,), r between 0.75 and 1.33.

    Its speed, pitch and formants are multiplied by r; then a microphone, half the time a telephone, a room, noise.
    """
    wave = resample(wave, round(160 * np.exp(rng.uniform(np.log(0.75), np.log(4 / 3)))), 160)
    spectrum, hz = np.fft.rfft(wave), np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    gain = np.interp(hz, np.linspace(0, 8000, 9), rng.normal(0, 3, 9).cumsum().clip(-15, 15))  # dB
    if rng.random() < 0.5:
        gain -= 60 * ((hz < rng.uniform(60, 300)) | (hz > rng.uniform(3300, 3900)))
    if rng.random() < 0.3:
        t = np.arange(int(rng.uniform(0.05, 0.4) * SAMPLE_RATE))
        echo = rng.normal(size=len(t)) * 10 ** (-3 * t / len(t))  # 60 dB down at its end
        echo *= 0.3 * rng.random() / np.linalg.norm(echo)
        spectrum *= 1 + np.fft.rfft(echo, len(wave))
    wave = np.fft.irfft(spectrum * 10 ** (gain / 20), len(wave))
    wave += rng.normal(size=len(wave)) * wave.std() * 10 ** (-rng.uniform(15, 45) / 20)
    return (wave * rng.uniform(0.1, 0.9) / np.abs(wave).max()).astype(np.float32)


def others(cfg: OthersConfig) -> None:
    """Write OUT/*.safetensors: `copies` of each training story, with another voice up to a random frame."""
    reader, tokenizer = UnitReader(Path(cfg.stories, "units/train")), SpeechTokenizer.load(device=pick_device().type)
    if any(Path(cfg.out).glob("*.safetensors")) and UnitReader(cfg.out).shards[0].header["source"] != cfg.stories:
        raise SystemExit(f"{cfg.out} holds other stories than {cfg.stories}; choose another --out")
    own = {id: np.repeat(reader.units(i), reader.durations(i)) for i, id in enumerate(reader.ids())}  # frames
    # The settings with which they were spoken (tts, voices, seed), so that they sound as they did.
    spoke = SimpleNamespace(**json.loads(Path(cfg.stories, "synth.json").read_text())["settings"])
    writer = UnitWriter(cfg.out, tokenizer.fingerprint, cfg.stories, durations=True, shard_tokens=20_000)
    stories = map(json.loads, Path(cfg.stories, "stories.jsonl").read_text(encoding="utf-8").splitlines())
    texts = {story["id"]: story["sentences"] for story in stories
             if story["id"] in own and f"{story['id']}_{cfg.copies - 1}" not in writer.done}
    with writer, speakers(spoke.tts, cfg.workers) as pool:
        for id, waves in spoken(spoke, pool, texts, "speaking"):
            wave, rng = np.concatenate(waves), np.random.default_rng((spoke.seed, zlib.crc32(id.encode())))
            n = len(own[id])
            ends = [n if rng.random() < cfg.all else int(rng.integers(n // 10, n)) for _ in range(cfg.copies)]
            begun = tokenizer.frames([another_voice(wave[:end * SAMPLE_RATE // 25], rng) for end in ends])
            for k, (end, frames) in enumerate(zip(ends, begun)):
                if f"{id}_{k}" not in writer.done:
                    units = tokenizer.finish(np.concatenate([frames, own[id][end:]]))
                    writer.add(f"{id}_{k}", *units, text=" ".join(texts[id]))
    reader = UnitReader(cfg.out)
    print(f"{cfg.out}: {len(reader)} stories, {reader.hours:.2f} h, {reader.n_tokens:,} tokens")


def flite(cfg: FliteConfig) -> None:
    """Write OUT/VOICE/*.wav and its manifest.jsonl; what is there is not spoken again."""
    pairs, out = read_manifest(cfg.set).pairs, Path(cfg.out, cfg.voice)
    manifest = Path(cfg.set, "manifest.jsonl").read_text(encoding="utf-8")
    if (out / "manifest.jsonl").exists() and (out / "manifest.jsonl").read_text(encoding="utf-8") != manifest:
        raise SystemExit(f"{out} holds other pairs than {cfg.set}; choose another --out")
    write_atomic(out / "manifest.jsonl", manifest)
    texts = {Path(pair[side]).name: pair[f"{side}_text"] for pair in pairs for side in SIDES}
    todo = [name for name in texts if not (out / name).exists()]
    with tempfile.TemporaryDirectory() as temporary:
        for package in ("flite", "libflite1") if todo else ():
            unpack(package, Path(temporary))
        library = next(Path(temporary).rglob("libflite.so.1"), Path()).parent

        def say(name: str) -> None:
            file = Path(temporary, name)
            subprocess.run([Path(temporary, "usr/bin/flite"), "-voice", cfg.voice, "-t", texts[name], "-o", file],
                           env={"LD_LIBRARY_PATH": str(library)}, check=True, timeout=60)
            shutil.move(file, out / f"{name}.part").rename(out / name)  # the folder of `file` may be on another disk

        with ThreadPoolExecutor(cfg.workers) as pool:
            for _ in tqdm(pool.map(say, todo), total=len(todo), disable=None, desc="speaking", unit="text"):
                pass
    print(f"{out}: {len(pairs)} pairs")


if __name__ == "__main__":
    command, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    commands = {"people": (people, PeopleConfig), "words": (words, WordsConfig), "examples": (words, ExamplesConfig),
                "others": (others, OthersConfig), "flite": (flite, FliteConfig)}
    if command not in commands:
        raise SystemExit(__doc__)
    commands[command][0](load_config(commands[command][1], arguments, __doc__))
