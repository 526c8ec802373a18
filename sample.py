"""Continue a spoken prompt aloud: wav -> units -> continuation -> wav, with what Whisper hears in it.

In:  audio (any format, rate and number of channels; files or folders) and checkpoints of train.py or dpo.py.
Out: a new folder with, per prompt, sample and checkpoint, two wavs (prompt + continuation; continuation alone),
     samples.json, and listen.html: all of it on one page, to compare by ear.

    python sample.py --prompt hello.wav                                   # the newest finished checkpoint under out/
    python sample.py --prompt recordings --checkpoint out/demo/lm --checkpoint out/demo/dpo --n 3
    python sample.py --prompt hello.wav --play                            # aloud, while it is still being made
    python sample.py                                                      # no prompt: the model begins by itself
    python sample.py --prompt hello.wav --resynth        # what tokeniser and vocoder keep of it; no language model

The tokeniser and the vocoder are those of the checkpoint's units. Seconds on two CPU cores.
"""
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile

from config import load_config
from model import UnitLM
from slam.audio import SAMPLE_RATE, check_wave, is_audio, load_audio, resample, walk
from slam.checkpoint import checkpoint_fingerprint, find_checkpoint, newest_checkpoint
from slam.device import pick_device
from slam.listen import Clip, Row, page
from slam.speech import continue_units, transcribe
from slam.stream import loudspeaker, stream
from slam.tokenizer import SpeechTokenizer, find_codebook
from slam.units import require_same
from slam.vocoder import vocoder_for


@dataclass
class Config:
    """Continue spoken prompts."""
    prompt: tuple[str, ...] = ()  # audio files to continue, or folders of them; none: the model begins by itself
    checkpoint: tuple[str, ...] = ()  # run folders, checkpoint folders or hub ids; none: the newest under out/
    out: str = ""  # a new folder for wavs, samples.json and listen.html; empty: out/samples, out/samples_2, …
    n: int = 1  # continuations of each prompt
    prompt_seconds: float = 10.0  # at most so much of a prompt is used: its end,
    from_start: bool = False  # or, with this, its beginning
    continuation_seconds: float = 8.0  # so much speech is added, to a unit
    allow_eos: bool = False  # let the model end a continuation early, even at once after a prompt that sounds complete
    temperature: float = 0.8  # 0 takes the most likely unit each time
    top_k: int = 25  # draw from the k most likely units; 0: from all
    top_p: float = 1.0  # draw from the most likely units that make up so much probability
    repetition_penalty: float = 1.1  # above 1, units already heard become less likely
    play: bool = False  # speak while the continuation is being made (by aplay, ffplay, mpv or sox)
    stdout: bool = False  # write it there instead, as raw PCM: 16 bit, little-endian, mono; messages go to stderr
    resynth: bool = False  # say the prompts again from their units instead, to hear what these keep
    transcribe: bool = True  # tell what the ASR hears
    asr: str = "embedded:whisper-tiny.en"  # Whisper for the transcripts
    tokenizer: str = ""  # codebook file; empty: that of the checkpoint's units (embedded, or below out/)
    vocoder: str = ""  # vocoder file, .safetensors or .pt; empty: one that speaks them
    speaker: int = 0  # of a vocoder with several
    seed: int = 0  # of the sampling
    overwrite: bool = False  # write over samples already in `out`

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = []
        if self.temperature < 0 or self.n < 1 or self.prompt_seconds <= 0 or self.continuation_seconds <= 0:
            found.append("temperature must not be negative; n, prompt_seconds and continuation_seconds are positive")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            found.append("top_k must not be negative, top_p lies in (0, 1], repetition_penalty is positive")
        if self.resynth and not self.prompt:
            found.append("resynth: name what is to be said again, as in --prompt hello.wav")
        if self.play and self.stdout:
            found.append("play and stdout: one or the other")
        if (self.play or self.stdout) and (self.n > 1 or len(self.checkpoint) > 1 or self.resynth):
            found.append("play and stdout speak one continuation by one checkpoint")
        if len(set(self.checkpoint)) < len(self.checkpoint):
            found.append("checkpoint: the same one twice")
        return found


# ---------------------------------------------------------------- what is asked for
def read_prompts(cfg: Config) -> dict[str, np.ndarray]:
    """{file: wave at 16 kHz, cut as the settings say}. SystemExit for a file that holds nothing to continue."""
    files, waves = [], {}
    for name in cfg.prompt:
        inside = [f for f in walk(name) if is_audio(f)] if Path(name).is_dir() else [name]
        if not inside:
            raise SystemExit(f"{name}: no audio files in this folder")
        files += inside
    for path in files:
        try:
            wave = load_audio(path)
            limit = round(cfg.prompt_seconds * SAMPLE_RATE)
            if len(wave) > limit and not cfg.resynth:
                which = "first" if cfg.from_start else "last"
                print(f"{path}: {len(wave) / SAMPLE_RATE:.1f} s long; its {which} {cfg.prompt_seconds:g} s are used")
                wave = wave[:limit] if cfg.from_start else wave[-limit:]
                check_wave(wave, f"{path}, its {which} {cfg.prompt_seconds:g} s")
        except ValueError as e:
            hint = "" if cfg.resynth else "; without --prompt the model begins by itself"
            raise SystemExit(f"{e}{hint}") from None
        waves[path] = wave
    return waves


def hear_speech(name: str, units: np.ndarray, durations: np.ndarray, rate_hz: float) -> None:
    """Say so if a prompt is hardly speech: 5 s of noise or hum have some ten kinds of units, of speech a hundred."""
    kinds, frames = len(set(units.tolist())), int(durations.sum())
    if kinds < 0.2 * min(frames, 5 * rate_hz):
        print(f"{name}: hardly any speech in it, it sounds like noise or silence ({kinds} kinds of units in "
              f"{frames / rate_hz:.1f} s); what follows will be made up", file=sys.stderr)


def new_folder(cfg: Config) -> Path:
    """Where the samples go. SystemExit if there are others."""
    if not cfg.out:
        names = chain(["out/samples"], (f"out/samples_{i}" for i in range(2, 1_000_000)))
        return next(path for path in map(Path, names) if not path.exists())
    if (Path(cfg.out) / "samples.json").exists() and not cfg.overwrite:
        raise SystemExit(f"{cfg.out} holds samples already; choose another --out, or --overwrite")
    return Path(cfg.out)


def labels(names: list[str]) -> list[str]:
    """The ends of paths, as long as they need to be to differ: out/a/lm, out/b/lm -> a-lm, b-lm."""
    parts = [[p for p in Path(name).parts if p not in ("/", "checkpoint")] or [name] for name in names]
    short = ["-".join(p[-1:]) for p in parts]
    for n in range(2, max(map(len, parts)) + 1):
        if len(set(short)) == len(short):
            break
        short = ["-".join(p[-n:]) for p in parts]
    return short if len(set(short)) == len(short) else [f"{name}-{i}" for i, name in enumerate(short)]


class Speaker:
    """A checkpoint with the tokeniser and the vocoder of its units. SystemExit if they do not fit."""

    def __init__(self, cfg: Config, name: str, label: str):
        device = pick_device()
        folder = find_checkpoint(name)
        fingerprint = checkpoint_fingerprint(folder)
        tokenizer = cfg.tokenizer or find_codebook(fingerprint)
        self.name, self.label, self.tokenizer = name, label, SpeechTokenizer.load(tokenizer, device.type)
        require_same(fingerprint, name, self.tokenizer.fingerprint, f"tokenizer {tokenizer}")
        self.vocoder, vocoder = vocoder_for(self.tokenizer, cfg.vocoder, cfg.speaker)
        self.made_of = {"checkpoint": name, "tokenizer": tokenizer, "vocoder": vocoder}
        self.lm = UnitLM.from_pretrained(folder).eval().to(device)
        record = Path(folder) / "slam.json"
        slam = json.loads(record.read_text()) if record.is_file() else {}
        self.about = [x for x in (name, f"{self.lm.n_params() / 1e6:.0f}M parameters",
                                  slam and f"{slam['stage']}, step {slam['step']:,}",
                                  f"tokenizer {tokenizer}, vocoder {vocoder}") if x]

    def draw(self, cfg: Config, prompts: list[list[int]], **more) -> list[list[int]]:
        """Tokens -> sampled continuations, at least `continuation_seconds` long: no unit is shorter than a frame."""
        n = math.ceil(cfg.continuation_seconds * self.tokenizer.fingerprint.unit_rate_hz)
        known = getattr(self.lm.config, "max_position_embeddings", n)
        if max(map(len, prompts)) + n + 1 > known:
            print(f"{self.name}: knows {known} tokens in a row; prompt and continuation may have "
                  f"{max(map(len, prompts)) + n + 1}", file=sys.stderr)
        try:
            return continue_units(self.lm, prompts, n, 32, cfg.seed, f"continuing, {self.label}", allow_eos=cfg.allow_eos,
                                  temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                                  repetition_penalty=cfg.repetition_penalty, **more)
        except ValueError as e:  # OPT has no more positions than it has learned
            raise SystemExit(f"{self.name}: {e}") from None

    def say(self, cfg: Config, prompt: list[int], new: list[int]) -> tuple[np.ndarray, float]:
        """Tokens of a prompt and its continuation -> the wave of both, and the second in which the latter begins."""
        before, units = len(self.tokenizer.to_units(prompt)), self.tokenizer.to_units(prompt + new)
        if not units:  # it ended before it began
            return np.zeros(0, np.float32), 0.0
        durations = self.vocoder.predict_durations(units)
        ends = np.append(0, np.cumsum(durations)) * self.vocoder.hop / self.vocoder.sample_rate
        n = int((ends <= ends[before] + cfg.continuation_seconds + 1e-6).sum()) - 1
        return self.vocoder.synthesize(units[:n], durations[:n])[0] if n else np.zeros(0, np.float32), ends[before]


# ---------------------------------------------------------------- all together
def say_again(cfg: Config, waves: dict[str, np.ndarray], out: Path) -> tuple[list[dict], list[str], list[Row]]:
    """Each wave as its units sound, with the durations that they had; the transcripts of both."""
    name = cfg.tokenizer or "embedded"
    if cfg.checkpoint and not cfg.tokenizer:
        name = find_codebook(checkpoint_fingerprint(find_checkpoint(cfg.checkpoint[0])))
    tokenizer = SpeechTokenizer.load(name, pick_device().type).base
    vocoder, vocoder_name = vocoder_for(tokenizer, cfg.vocoder, cfg.speaker, durations=True)
    rate_hz, records, spoken = tokenizer.fingerprint.unit_rate_hz, [], []
    out.mkdir(parents=True, exist_ok=True)
    for i, (source, wave) in enumerate(waves.items()):
        units, durations = tokenizer.encode(wave, SAMPLE_RATE)
        hear_speech(source, units, durations, rate_hz)
        again, sample_rate = vocoder.synthesize(units, durations)
        path = out / f"{i:02d}_{Path(source).stem}_resynth.wav"
        soundfile.write(path, again, sample_rate)
        spoken.append(again)
        records.append({"tokenizer": name, "vocoder": vocoder_name, "prompt_file": source, "units": units.tolist(),
                        "durations": durations.tolist(), "resynth": str(path),
                        "units_per_second": round(len(units) / durations.sum() * rate_hz, 1)})
    if cfg.transcribe:
        texts = transcribe([*waves.values(), *(resample(x, vocoder.sample_rate, SAMPLE_RATE) for x in spoken)], cfg.asr)
        for record, before, after in zip(records, texts, texts[len(waves):]):
            record |= {"prompt_text": before, "resynth_text": after}
    rows = []
    for (source, wave), again, r in zip(waves.items(), spoken, records):
        print(f"{r['resynth']}: {r['units_per_second']} units per second")
        print(f"  original:       {r.get('prompt_text', '')}\n  from its units: {r.get('resynth_text', '')}")
        rows.append(Row(Path(source).name, Clip(wave, SAMPLE_RATE, r.get("prompt_text", "")), [[Clip(
            again, vocoder.sample_rate, r.get("resynth_text", ""), note=Path(r["resynth"]).name)]]))
    return records, [f"from its units\ntokenizer {name}, vocoder {vocoder_name}"], rows


def continue_all(cfg: Config, waves: dict[str, np.ndarray], out: Path) -> tuple[list[dict], list[str], list[Row]]:
    """Every prompt continued `n` times by every checkpoint, as wavs; then what is heard in them."""
    names = list(cfg.checkpoint) or [newest_checkpoint()]
    print(f"checkpoint: {', '.join(names)}")
    speakers = [Speaker(cfg, name, label) for name, label in zip(names, labels(names))]
    sources, records, clips, alone = list(waves) or [""], [], [], []
    out.mkdir(parents=True, exist_ok=True)
    for speaker in speakers:
        encoded, rate = [], speaker.vocoder.sample_rate
        for source in sources:
            units, durations = speaker.tokenizer.encode(waves[source], SAMPLE_RATE) if source else ([], [])
            if source and speaker is speakers[0]:
                hear_speech(source, units, durations, speaker.tokenizer.base_fingerprint.unit_rate_hz)
            encoded.append(list(map(int, units)))
        prompts = [tokens for tokens in encoded for _ in range(cfg.n)]
        if cfg.play or cfg.stdout:
            with loudspeaker(rate) if cfg.play else contextlib.nullcontext(sys.__stdout__.buffer) as sink:
                print(f"speaking: 16-bit little-endian PCM, mono, {rate} Hz", file=sys.stderr)
                tokens, *said = stream(cfg, speaker, prompts[0], sink)
            new, spoken = [tokens], [said]
        else:
            new = speaker.draw(cfg, prompts)
            spoken = [speaker.say(cfg, *x) for x in zip(prompts, new)]
        for i, (prompt, tokens, (wave, starts)) in enumerate(zip(prompts, new, spoken)):
            source, k = sources[i // cfg.n], i % cfg.n
            stem = f"{i // cfg.n:02d}_{Path(source).stem or 'unprompted'}_{k}" + f"_{speaker.label}" * (len(names) > 1)
            record = {**speaker.made_of, "prompt_file": source, "prompt_units": prompt, "units": tokens,
                      "continuation_starts": round(starts, 3)}
            continuation = wave[round(starts * rate):]
            for kind, part in (("whole", wave), ("continuation", continuation)):
                if len(part):
                    record[kind] = str(out / f"{stem}_{kind}.wav")
                    soundfile.write(record[kind], part, rate)
            if len(continuation):
                alone.append((record, resample(continuation, rate, SAMPLE_RATE)))
            records.append(record)
            clips.append(Clip(wave, rate, starts=starts, note=f"{stem}_whole.wav"))
    print(f"{sum('whole' in r for r in records)} continuations are in {out}")
    if cfg.transcribe:
        texts = transcribe([*waves.values(), *(part for _, part in alone)], cfg.asr)
        prompt_texts = dict(zip(waves, texts))
        for (r, _), text in zip(alone, texts[len(waves):]):
            r["continuation_text"] = text
        for r, clip in zip(records, clips):
            r["prompt_text"] = clip.prompt_text = prompt_texts.get(r["prompt_file"], "")
            clip.text = r.get("continuation_text", "")
    for r in records:
        print(f"{r.get('whole', '(it ended before it began)')}\n  prompt:       {r.get('prompt_text', '')}\n"
              f"  continuation: {r.get('continuation_text', '' if 'continuation' in r else '(ended at once)')}")
    rows = [Row(Path(source).name or "unprompted",
                Clip(waves[source], SAMPLE_RATE, clips[i * cfg.n].prompt_text) if source else None,
                [[c for c in clips[s * len(sources) * cfg.n + i * cfg.n:][:cfg.n] if len(c.wave)]
                 for s in range(len(speakers))]) for i, source in enumerate(sources)]
    return records, ["\n".join([s.label, *s.about]) for s in speakers], rows


def main(cfg: Config) -> None:
    out, waves = new_folder(cfg), read_prompts(cfg)
    if cfg.stdout and sys.__stdout__.isatty():
        raise SystemExit("stdout: raw PCM is not for a terminal; lead it to a program or a file")
    if (cfg.play or cfg.stdout) and len(waves) > 1:
        raise SystemExit(f"play and stdout speak one continuation; --prompt names {len(waves)} files")
    records, columns, rows = (say_again if cfg.resynth else continue_all)(cfg, waves, out)
    (out / "samples.json").write_text(json.dumps({"config": asdict(cfg), "samples": records}, indent=1))
    shown = ("temperature", "top_k", "top_p", "repetition_penalty", "allow_eos", "prompt_seconds", "seed")
    settings = {} if cfg.resynth else {k.replace("_", " "): getattr(cfg, k) for k in shown}
    settings |= {"heard by": cfg.asr if cfg.transcribe else "nobody", "made": time.strftime("%Y-%m-%d %H:%M")}
    title = "Speech from its units" if cfg.resynth else "Spoken prompts, continued"
    (out / "listen.html").write_text(page(title, settings, ["prompt", *columns], rows), encoding="utf-8",
                                     errors="backslashreplace")
    print(f"open {out / 'listen.html'} to listen")


if __name__ == "__main__":
    config = load_config(Config, sys.argv[1:], __doc__)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    with contextlib.redirect_stdout(sys.stderr) if config.stdout else contextlib.nullcontext():
        main(config)
