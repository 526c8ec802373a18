"""Speech unlike the stories: people's, to measure the embedded parts on, and random words, to train the vocoder on.

    python dev/voices.py people                             # out/people/telephone, out/people/audiobook: from Debian
    python eval.py --resynth_from out/people/telephone
    python dev/voices.py words                              # out/words/audio: 2 h in the TTS' voice; one minute

No word predicts the next, so a vocoder learns to trust the units and not what stories tend to say.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Literal

import numpy as np

from config import load_config
from slam.audio import SAMPLE_RATE, load_audio
from slam.embedded import resolve
from slam.tts import speakers, spoken, write_audio

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
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            unpack(package, Path(temporary))
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


def words(cfg: WordsConfig) -> None:
    """Write OUT/NUMBER.flac."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = {id: text for id, text in word_texts(cfg.recordings, cfg.seed).items() if not (out / f"{id}.flac").exists()}
    with speakers(cfg.tts, cfg.workers) as pool:
        for id, waves in spoken(cfg, pool, texts, "speaking"):
            write_audio(out / f"{id}.flac", np.concatenate(waves))
    print(f"{out}: {cfg.recordings} recordings")


if __name__ == "__main__":
    command, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    commands = {"people": (people, PeopleConfig), "words": (words, WordsConfig)}
    if command not in commands:
        raise SystemExit(__doc__)
    commands[command][0](load_config(commands[command][1], arguments, __doc__))
