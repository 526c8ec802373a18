"""Continue a spoken prompt aloud: wav -> units -> continuation -> wav, with what Whisper hears in it.

In:  audio files (any rate, any number of channels) and a checkpoint of train.py or dpo.py.
Out: a folder with, per prompt and sample, two wavs (prompt + continuation; continuation alone) and samples.json.

    python sample.py --prompt hello.wav                                  # the newest finished checkpoint under out/
    python sample.py --prompt a.wav,b.wav --checkpoint out/demo/dpo --n 3 --temperature 0.7
    python sample.py --prompt hello.wav --resynth        # what tokeniser and vocoder keep of it; no language model

Seconds on two CPU cores.
"""
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile

from audio import SAMPLE_RATE, load_audio
from config import load_config
from eval import continue_units, transcribe
from model import UnitLM, find_checkpoint
from speech_tokenizer import SpeechTokenizer
from train import checkpoint_fingerprint, pick_device
from units import require_same
from vocoder import Vocoder


@dataclass
class Config:
    """Continue spoken prompts."""
    prompt: tuple[str, ...] = ()  # audio files to continue
    resynth: bool = False  # say the prompts again from their units instead, to hear what these keep
    checkpoint: str = ""  # run folder, checkpoint folder or hub id; empty: the newest finished one under out/
    out: str = "out/samples"  # folder for the wavs and samples.json
    n: int = 1  # continuations of each prompt
    prompt_seconds: float = 10.0  # at most so much of a prompt is used: its end,
    from_start: bool = False  # or, with this, its beginning
    continuation_seconds: float = 8.0  # about so much speech is added
    may_end: bool = False  # let the model end a continuation early, even at once after a prompt that sounds complete
    temperature: float = 0.8  # 0 takes the most likely unit each time
    top_k: int = 25  # draw from the k most likely units; 0: from all
    top_p: float = 1.0  # draw from the most likely units that make up so much probability
    repetition_penalty: float = 1.1  # above 1, units already heard become less likely
    transcribe: bool = True  # print what the ASR hears
    asr: str = "embedded:whisper-tiny.en"  # Whisper for the transcripts
    tokenizer: str = "embedded"  # codebook file; must be the checkpoint's
    vocoder: str = "embedded"  # vocoder file; must speak the checkpoint's units
    seed: int = 0  # of the sampling
    overwrite: bool = False  # write over samples already in `out`

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = [] if self.prompt else ["prompt: name at least one audio file, as in --prompt hello.wav"]
        if self.temperature < 0 or self.n < 1 or self.prompt_seconds <= 0 or self.continuation_seconds <= 0:
            found.append("temperature must not be negative; n, prompt_seconds and continuation_seconds are positive")
        return found


def newest_checkpoint(root: str = "out") -> str:
    """The run folder below `root` with the newest finished checkpoint. SystemExit if there is none."""
    found = [p for p in Path(root).rglob("checkpoint/slam.json") if json.loads(p.read_text()).get("finished")]
    if not found:
        raise SystemExit(f"no finished checkpoint under {root}/; train one (bash runs/demo.sh) or name one with "
                         f"--checkpoint")
    return str(max(found, key=lambda p: p.stat().st_mtime).parent.parent)


def say_again(cfg: Config, waves: list, tokenizer: SpeechTokenizer, vocoder: Vocoder) -> list[dict]:
    """Each wave as its units sound, with the durations that they had; the transcripts of both."""
    records = []
    for i, (source, wave) in enumerate(zip(cfg.prompt, waves)):
        units, durations = tokenizer.encode(wave, SAMPLE_RATE)
        again, sample_rate = vocoder.synthesize(units, durations)
        path = Path(cfg.out) / f"{i:02d}_{Path(source).stem}_resynth.wav"
        soundfile.write(path, again, sample_rate)
        records.append({"prompt_file": source, "units": units.tolist(), "durations": durations.tolist(),
                        "resynth": str(path)})
    if cfg.transcribe:
        heard = transcribe([w for r, wave in zip(records, waves) for w in (wave, load_audio(r["resynth"]))], cfg.asr)
        for record, before, after in zip(records, heard[::2], heard[1::2]):
            record |= {"prompt_text": before, "resynth_text": after}
    for r in records:
        print(f"{r['resynth']}: {len(r['units']) / sum(r['durations']) * tokenizer.fingerprint.unit_rate_hz:.1f} units "
              f"per second\n  original:      {r.get('prompt_text', '')}\n  from its units: {r.get('resynth_text', '')}")
    return records


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if (out / "samples.json").exists() and not cfg.overwrite:
        raise SystemExit(f"{out} holds samples already; choose another --out, or --overwrite")
    waves = []
    for path in cfg.prompt:
        try:
            wave = load_audio(path)
        except ValueError as e:
            raise SystemExit(str(e)) from None
        limit = round(cfg.prompt_seconds * SAMPLE_RATE)
        if len(wave) > limit and not cfg.resynth:
            which = "first" if cfg.from_start else "last"
            print(f"{path}: {len(wave) / SAMPLE_RATE:.1f} s long; its {which} {cfg.prompt_seconds:g} s are used")
        waves.append(wave if cfg.resynth else wave[:limit] if cfg.from_start else wave[-limit:])
    device = pick_device()
    tokenizer, vocoder = SpeechTokenizer.load(cfg.tokenizer, device.type), Vocoder.load(cfg.vocoder).to(device)
    require_same(tokenizer.base_fingerprint, cfg.tokenizer, vocoder.fingerprint, f"vocoder {cfg.vocoder}")
    if cfg.resynth:
        out.mkdir(parents=True, exist_ok=True)
        records = say_again(cfg, waves, tokenizer.base, vocoder)
        (out / "samples.json").write_text(json.dumps({"config": asdict(cfg), "samples": records}, indent=1))
        return
    name = cfg.checkpoint or newest_checkpoint()
    print(f"checkpoint: {name}")
    folder = find_checkpoint(name)
    fingerprint = checkpoint_fingerprint(folder)
    require_same(fingerprint, name, tokenizer.fingerprint, f"tokenizer {cfg.tokenizer}")
    lm = UnitLM.from_pretrained(folder).eval().to(device)

    encoded = [tokenizer.encode(wave, SAMPLE_RATE)[0].tolist() for wave in waves]
    # A unit lasts as long in the continuation as it did in the prompts, on average.
    rate = sum(map(len, encoded)) / (sum(map(len, waves)) / SAMPLE_RATE)
    prompts = [units for units in encoded for _ in range(cfg.n)]
    new = continue_units(lm, prompts, max(1, round(cfg.continuation_seconds * rate)), 32, cfg.seed, "continuing",
                         may_end=cfg.may_end, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                         repetition_penalty=cfg.repetition_penalty)
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for i, (prompt, units) in enumerate(zip(prompts, new)):
        source = Path(cfg.prompt[i // cfg.n])
        stem = f"{i // cfg.n:02d}_{source.stem}_{i % cfg.n}"
        record = {"prompt_file": str(source), "prompt_units": prompt, "units": units}
        for kind, x in (("whole", prompt + units), ("continuation", units)):
            if x:
                wave, sample_rate = vocoder.synthesize(tokenizer.to_units(x))
                record[kind] = str(out / f"{stem}_{kind}.wav")
                soundfile.write(record[kind], wave, sample_rate)
        records.append(record)
    if cfg.transcribe:
        heard = [(r, kind) for r in records for kind in ("whole", "continuation") if kind in r]
        for (record, kind), text in zip(heard, transcribe([load_audio(r[kind]) for r, kind in heard], cfg.asr)):
            record[f"{kind}_text"] = text
    record = {"checkpoint": name, "config": asdict(cfg), "samples": records}
    (out / "samples.json").write_text(json.dumps(record, indent=1))
    for r in records:
        print(f"{r['whole']}\n  heard: {r.get('whole_text', '')}\n"
              f"  continuation: {r.get('continuation_text', '(ended at once)')}")


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
