"""Continue a spoken prompt aloud: wav -> units -> continuation -> wav, with Whisper's transcripts.

In:  audio (any format, sample rate and number of channels; files or folders) and checkpoints of train.py or dpo.py.
Out: a new folder with two wavs per prompt, sample and checkpoint (prompt + continuation; continuation alone),
     samples.json, and listen.html, one page to compare them by ear.

    python sample.py --prompt hello.wav                           # the newest model under out/, or embedded:slam-mini
    python sample.py --prompt recordings --checkpoint out/demo/lm --checkpoint out/demo/dpo --n 3
    python sample.py --prompt hello.wav --play                            # play it while it is being generated
    python sample.py                                                      # no prompt: the model starts by itself
    python sample.py --prompt hello.wav --answer text                     # a model of speech and text writes on
    python sample.py --prompt hello.wav --resynth        # re-synthesis without LM: what tokeniser and vocoder keep

The tokeniser and the vocoder are those of the checkpoint's units. Takes seconds on two CPU cores.
"""
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from config import load_config
from model import UnitLM
from slam.audio import SAMPLE_RATE, check_wave, is_audio, load_audio, resample, walk
from slam.checkpoint import checkpoint_fingerprint, newest_checkpoint
from slam.device import pick_device
from slam.tokenizer import SpeechTokenizer, find_codebook
from slam.units import require_same, write_atomic
from slam.vocoder import vocoder_for


@dataclass
class Config:
    """Continue spoken prompts."""
    prompt: tuple[str, ...] = ()  # audio files to continue, or folders of them; none: the model starts by itself
    checkpoint: tuple[str, ...] = ()  # run folders, checkpoint folders or hub ids; none: the newest under out/,
    # or if there is none, the model that comes with the code, embedded:slam-mini
    out: str = ""  # new folder for wavs, samples.json and listen.html; empty: out/samples, out/samples_2, …
    n: int = 1  # continuations per prompt
    prompt_seconds: float = 10.0  # longest prompt; a longer recording is cut to its last seconds. inf: no limit
    from_start: bool = False  # cut it to its first seconds instead
    continuation_seconds: float = 8.0  # length of a continuation, to within a unit
    allow_eos: bool = False  # the model may end a continuation early, even at once after a complete sentence
    temperature: float = 0.8  # 0: the most likely unit each time
    top_k: int = 25  # draw from the k most likely units; 0: from all
    top_p: float = 1.0  # draw from the most likely units that together have this probability
    repetition_penalty: float = 1.1  # above 1: units already heard become less likely
    play: bool = False  # play prompt and continuation while it is generated (aplay, ffplay, mpv or sox)
    stdout: bool = False  # write both to stdout as raw PCM: 16 bit, little-endian, mono; messages go to stderr
    answer: Literal["speech", "text"] = "speech"  # text: a model of speech and text writes, 60 tokens at most
    resynth: bool = False  # speak the prompts again from their units, to hear what is lost; no language model
    transcribe: bool = True  # print and save what the ASR hears of the first 30 s
    asr: str = "embedded:whisper-tiny.en"  # Whisper for the transcripts
    tokenizer: str = ""  # codebook file; empty: that of the checkpoint's units (embedded, or below out/)
    vocoder: str = ""  # vocoder file, .safetensors or .pt; empty: one that speaks the checkpoint's units
    speaker: int = 0  # voice of a vocoder with several
    seed: int = 0  # of the sampling
    overwrite: bool = False  # replace samples already in `out`

    def problems(self) -> list[str]:
        aloud = self.play or self.stdout
        return [problem for found, problem in (
            (self.temperature < 0 or self.n < 1 or self.prompt_seconds <= 0 or not 0 < self.continuation_seconds < 1e6,
             "temperature must not be negative; n, prompt_seconds and continuation_seconds (finite) are positive"),
            (self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0,
             "top_k must not be negative, top_p lies in (0, 1], repetition_penalty is positive"),
            (self.resynth and not self.prompt, "resynth: name a recording to speak again, as in --prompt hello.wav"),
            (self.answer == "text" and (not self.prompt or aloud or self.resynth),
             "answer = text: needs a prompt, and neither play, stdout nor resynth"),
            (self.play and self.stdout, "play and stdout: one or the other"),
            (aloud and (self.n > 1 or len(self.checkpoint) > 1 or self.resynth),
             "play and stdout speak one continuation by one checkpoint")) if found]


# ---------------------------------------------------------------- prompts and output
def read_prompts(cfg: Config) -> dict[str, np.ndarray]:
    """{file: wave (T,) at 16 kHz, cut to `prompt_seconds`}. SystemExit for a file with nothing to continue."""
    files, waves = [], {}
    for name in cfg.prompt:
        inside = [f for f in walk(name) if is_audio(f)] if Path(name).is_dir() else [name]
        if not inside:
            raise SystemExit(f"{name}: no audio files in this folder")
        files += inside
    limit, which = cfg.prompt_seconds * SAMPLE_RATE, "first" if cfg.from_start else "last"
    for path in files:
        try:
            waves[path] = wave = load_audio(path)
            if len(wave) > limit and not cfg.resynth:
                print(f"{path}: {len(wave) / SAMPLE_RATE:.1f} s long; its {which} {cfg.prompt_seconds:g} s are used")
                waves[path] = wave[:round(limit)] if cfg.from_start else wave[-round(limit):]
                check_wave(waves[path], f"{path}, its {which} {cfg.prompt_seconds:g} s")
        except ValueError as e:
            raise SystemExit(f"{e}" + "; without --prompt the model starts by itself" * (not cfg.resynth)) from None
    return waves


def warn_if_no_speech(name: str, units: np.ndarray, durations: np.ndarray, rate_hz: float) -> None:
    """Warn of a prompt with few different units: 5 s of noise or hum have about ten, 5 s of speech a hundred."""
    kinds, frames = len(set(units.tolist())), int(durations.sum())
    if kinds < 0.2 * min(frames, 5 * rate_hz):
        print(f"{name}: hardly any speech, it sounds like noise or silence ({kinds} different units in "
              f"{frames / rate_hz:.1f} s); the continuation will have little to do with it", file=sys.stderr)


def make_folder(name: str) -> Path:
    """Make the folder for the samples: `name`, or if it is empty the first free one of out/samples, out/samples_2, …"""
    for i in itertools.count(1):
        path = Path(name or ("out/samples" if i == 1 else f"out/samples_{i}"))
        try:
            path.mkdir(parents=True, exist_ok=bool(name))
            return path
        except OSError as e:
            if name or not path.exists():
                raise SystemExit(f"{path}: can't be made a folder ({e.strerror}); name another --out") from None


def labels(names: list[str]) -> list[str]:
    """Short names: out/demo/lm, embedded:slam-mini -> lm, slam-mini; out/a/lm, out/b/lm -> lm_1, lm_2."""
    short = [p.parent.name if p.name == "checkpoint" else p.name.rpartition(":")[2] for p in map(Path, names)]
    return short if len(set(short)) == len(short) else [f"{name}_{i}" for i, name in enumerate(short, 1)]


# ---------------------------------------------------------------- models
class Speaker:
    """A checkpoint (none: resynth), tokeniser and vocoder of the same units. SystemExit if they do not fit together."""

    def __init__(self, cfg: Config, name: str, label: str):
        device = pick_device()
        fingerprint = checkpoint_fingerprint(name) if name else None
        tokenizer = cfg.tokenizer or (find_codebook(fingerprint) if name else "embedded")
        self.name, self.label, self.fingerprint = name, label, fingerprint
        self.tokenizer = SpeechTokenizer.load(tokenizer, device.type)
        if name:
            require_same(fingerprint, name, self.tokenizer.fingerprint, f"tokenizer {tokenizer}")
        if cfg.resynth:
            self.tokenizer = self.tokenizer.base  # units, not pieces of several units
        self.vocoder, vocoder = (None, "") if cfg.answer == "text" else \
            vocoder_for(self.tokenizer, cfg.vocoder, cfg.speaker)
        self.made_of = {"checkpoint": name, "tokenizer": tokenizer, "vocoder": vocoder}
        self.about = [label or "from its units", *(f"{k} {v}" for k, v in self.made_of.items() if v)]
        if not cfg.resynth:
            self.lm = UnitLM.from_pretrained(name).eval().to(device)
            self.about.append(f"{self.lm.n_params() / 1e6:.0f}M parameters")

    def draw(self, cfg: Config, prompts: list[list[int]], progress=None) -> list[list[int]]:
        """Tokens of prompts -> new tokens, enough for `continuation_seconds`: a unit lasts at least a frame."""
        from slam.speech import continue_units
        n = math.ceil(cfg.continuation_seconds * self.tokenizer.fingerprint.unit_rate_hz)
        try:
            return continue_units(self.lm, prompts, n, 32, cfg.seed, f"continuing, {self.label}",
                                  allow_eos=cfg.allow_eos, temperature=cfg.temperature, top_k=cfg.top_k,
                                  top_p=cfg.top_p, repetition_penalty=cfg.repetition_penalty, progress=progress)
        except ValueError as e:  # OPT has no more positions than it has learned
            raise SystemExit(f"{self.name}: {e}") from None

    def say(self, cfg: Config, prompt: list[int], new: list[int]) -> tuple[np.ndarray, float]:
        """Tokens of a prompt and its continuation -> the wave (T,) of both, and the second where the latter starts."""
        before, units = len(self.tokenizer.to_units(prompt)), self.tokenizer.to_units(prompt + new)
        durations = self.vocoder.predict_durations(units) if units else np.zeros(0)
        ends = np.append(0, np.cumsum(durations)) * self.vocoder.hop / self.vocoder.sample_rate
        n = int((ends <= ends[before] + cfg.continuation_seconds + 1e-6).sum()) - 1
        return self.vocoder.synthesize(units[:n], durations[:n])[0] if n else np.zeros(0, np.float32), ends[before]


# ---------------------------------------------------------------- what is made of the prompts
def resynthesize(cfg: Config, speaker: Speaker, encoded: list[tuple]) -> Iterator[tuple[np.ndarray, float, dict]]:
    """Units and durations (N,) of each prompt -> its wave (T,), 0.0, and its entry in samples.json."""
    for units, durations in encoded:
        rate = round(len(units) / durations.sum() * speaker.tokenizer.fingerprint.unit_rate_hz, 1)
        print(f"{rate} units per second")
        yield speaker.vocoder.synthesize(units, durations)[0], 0.0, {
            "units": units.tolist(), "durations": durations.tolist(), "units_per_second": rate}


def continue_prompts(cfg: Config, speaker: Speaker, encoded: list[tuple]) -> Iterator[tuple[np.ndarray, float, dict]]:
    """Each prompt continued `n` times -> wave (T,) of both, the second where the continuation starts, the entry."""
    prompts = [units.tolist() for units, _ in encoded for _ in range(cfg.n)] or [[]] * cfg.n
    if cfg.play or cfg.stdout:
        from slam.stream import loudspeaker, stream
        rate = speaker.vocoder.sample_rate
        print(f"speaking: 16-bit little-endian PCM, mono, {rate} Hz", file=sys.stderr)
        # Unbuffered, because Python flushes buffers at its exit, and that fails if the pipe is closed.
        with loudspeaker(rate) if cfg.play else open(sys.__stdout__.fileno(), "wb", 0, closefd=False) as sink:
            tokens, *said = stream(lambda progress: speaker.draw(cfg, prompts, progress), speaker.tokenizer,
                                   speaker.vocoder, prompts[0], cfg.continuation_seconds, sink)
        new, spoken = [tokens], [said]
    else:
        new = speaker.draw(cfg, prompts)
        spoken = [speaker.say(cfg, *both) for both in zip(prompts, new)]
    for prompt, tokens, (wave, starts) in zip(prompts, new, spoken):
        yield wave, starts, {"prompt_units": prompt, "units": tokens, "continuation_starts": round(starts, 3)}


def write_answers(cfg: Config, speakers: list[Speaker], waves: dict[str, np.ndarray], out: Path) -> None:
    """Every prompt continued in text by every checkpoint, printed and written to samples.json."""
    from slam.cross_modal import answer_in_text
    records = []
    for speaker in speakers:
        if not speaker.fingerprint.text_lm:
            raise SystemExit(f"answer: {speaker.name} knows speech only; train.py --mix trains on speech and text")
        for source, wave in waves.items():
            units = speaker.tokenizer.encode(wave, SAMPLE_RATE)[0].tolist()
            texts = answer_in_text(speaker.lm, [units] * cfg.n, speaker.fingerprint, 60, cfg.seed, top_p=cfg.top_p,
                                   temperature=cfg.temperature, top_k=cfg.top_k,
                                   repetition_penalty=cfg.repetition_penalty)
            for text in texts:
                print(f"{source}, {speaker.label}: {text}")
                records.append({**speaker.made_of, "prompt_file": source, "prompt_units": units, "answer_text": text})
    write_atomic(out / "samples.json", json.dumps({"config": asdict(cfg), "samples": records}, indent=1))


def main(cfg: Config) -> None:
    import soundfile

    from slam.listen import Clip, page

    # ---- settings
    kind = "resynth" if cfg.resynth else "continuation"
    if cfg.out and (Path(cfg.out) / "samples.json").exists() and not cfg.overwrite:
        raise SystemExit(f"{cfg.out} holds samples already; choose another --out, or --overwrite")
    if cfg.stdout and sys.__stdout__.isatty():
        raise SystemExit("stdout: raw PCM is not for a terminal; pipe it into a program or a file")

    # ---- prompts
    waves = read_prompts(cfg)
    if (cfg.play or cfg.stdout) and len(waves) > 1:
        raise SystemExit(f"play and stdout speak one continuation; --prompt names {len(waves)} files")
    sources, n = list(waves) or [""], 1 if cfg.resynth else cfg.n

    # ---- models
    names = list(cfg.checkpoint) or ["" if cfg.resynth else newest_checkpoint(otherwise="embedded:slam-mini")]
    speakers = [Speaker(cfg, name, label) for name, label in zip(names, labels(names))]

    # ---- units of the prompts, continuations, speech
    out = make_folder(cfg.out)
    if cfg.answer == "text":
        return write_answers(cfg, speakers, waves, out)
    records, columns, new_waves = [], [], []
    for speaker in speakers:
        print(*speaker.about, sep=", ")
        encoded = [speaker.tokenizer.encode(wave, SAMPLE_RATE) for wave in waves.values()]
        if speaker is speakers[0]:
            for source, units in zip(sources, encoded):
                warn_if_no_speech(source, *units, speaker.tokenizer.fingerprint.unit_rate_hz)
        clips, rate, make = [], speaker.vocoder.sample_rate, resynthesize if cfg.resynth else continue_prompts
        for i, (wave, starts, record) in enumerate(make(cfg, speaker, encoded)):
            source = sources[i // n]
            stem = f"{i // n:02d}_{Path(source).stem or 'unprompted'}" + f"_{i % n}" * (not cfg.resynth) \
                + f"_{speaker.label}" * (len(speakers) > 1)
            record = {**speaker.made_of, "prompt_file": source, **record}
            parts = {"resynth": wave} if cfg.resynth else {"whole": wave, "continuation": wave[round(starts * rate):]}
            for part, samples in parts.items():
                if len(samples):
                    record[part] = str(out / f"{stem}_{part}.wav")
                    soundfile.write(record[part], samples, rate)
            records.append(record)
            clips.append(Clip(wave, rate, starts=starts, note=f"{stem}_{next(iter(parts))}.wav"))
            new_waves.append(resample(parts[kind], rate, SAMPLE_RATE) if len(parts[kind]) else parts[kind])
        columns.append(clips)

    # ---- transcripts
    heard = {}
    if cfg.transcribe:
        from slam.speech import transcribe
        texts = transcribe([*waves.values(), *new_waves], cfg.asr)
        heard = dict(zip(waves, texts))
        for record, clip, text in zip(records, itertools.chain(*columns), texts[len(waves):]):
            record |= {"prompt_text": heard.get(record["prompt_file"], ""), f"{kind}_text": text}
            clip.text, clip.prompt_text = text, "" if cfg.resynth else record["prompt_text"]
    for record in records:
        print(record.get("resynth") or record.get("whole", "(no sound: the model ended at once)"))
        if cfg.transcribe:
            print(f"  prompt:       {record['prompt_text']}\n"
                  f"  {kind + ':':13} {record[f'{kind}_text'] if kind in record else '(ended at once)'}")

    # ---- samples.json and the page
    write_atomic(out / "samples.json", json.dumps({"config": asdict(cfg), "samples": records}, indent=1))
    shown = ("temperature", "top_k", "top_p", "repetition_penalty", "allow_eos", "prompt_seconds", "from_start", "seed")
    settings = {} if cfg.resynth else {name.replace("_", " "): getattr(cfg, name) for name in shown}
    settings |= {"transcripts": cfg.asr if cfg.transcribe else "none", "made": time.strftime("%Y-%m-%d %H:%M")}
    rows = [(Path(source).name or "unprompted",
             [[Clip(waves[source], SAMPLE_RATE, heard.get(source, ""))] if source else [],
              *([clip for clip in clips[i * n:i * n + n] if len(clip.wave)] for clips in columns)])
            for i, source in enumerate(sources)]
    title = "Speech from its units" if cfg.resynth else "Spoken prompts, continued"
    write_atomic(out / "listen.html", page(title, settings, ["prompt", *("\n".join(s.about) for s in speakers)], rows))
    print(f"open {out / 'listen.html'} to listen")


if __name__ == "__main__":
    config = load_config(Config, sys.argv[1:], __doc__)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    sys.stdout = sys.stderr if config.stdout else sys.stdout
    main(config)
