"""Speak a continuation while it is being generated, as 16-bit PCM.

    python sample.py --prompt hello.wav --play
    python sample.py --prompt hello.wav --stdout | aplay -f S16_LE -r 16000
"""
import contextlib
import shutil
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import torch

from slam.units import to_units


def stream(draw: Callable, tokenizer, vocoder, prompt: list[int], seconds: float,
           sink: BinaryIO) -> tuple[list[int], np.ndarray, float]:
    """Write prompt and continuation to `sink` as 16-bit PCM, each piece as soon as no later unit can change it.

    draw(progress): draws tokens as `UnitLM.generate` does. prompt: tokens of the tokenizer. Returns the new tokens, the
    wave (T,) float32 with at most `seconds` of continuation, and the second where that starts. A closed pipe or Ctrl-C
    ends it early; what was written is returned.
    """
    before = tokenizer.to_units(prompt)
    starts = int(vocoder.predict_durations(before).sum()) * vocoder.hop if before else 0
    limit = starts + round(seconds * vocoder.sample_rate)
    parts, said, drawn = deque(), np.zeros(0, np.float32), []
    pieces = vocoder.stream(iter(parts.popleft, None))  # takes one part, and yields one piece, per `next`

    def say(units: list[int] | None) -> bool:
        """Write the piece that these units settle (None: the rest). True when the wave has its full length."""
        nonlocal said
        parts.append(units)
        with torch.autocast(vocoder.device.type, enabled=False):  # the language model's may be on
            piece = next(pieces, said[:0])[:limit - len(said)]
        said = np.append(said, piece)
        sink.write((piece * 32767).round().astype("<i2").tobytes())
        sink.flush()
        return len(said) >= limit

    def progress(new: torch.Tensor) -> bool:
        units = to_units(new[0].tolist())[len(drawn):]
        drawn.extend(units)
        return bool(units) and say(tokenizer.to_units(units))

    try:
        if before:
            say(before)
        draw(progress)
        say(None)
    except (BrokenPipeError, KeyboardInterrupt):
        print("playback was stopped; the sound written so far is kept", file=sys.stderr)
    return drawn, said, starts / vocoder.sample_rate


PLAYERS = (["aplay", "-q", "-"], ["ffplay", "-nodisp", "-autoexit", "-loglevel", "quiet", "-"],
           ["mpv", "--really-quiet", "-"], ["play", "-q", "-t", "wav", "-"])  # each plays a wav from its stdin


@contextlib.contextmanager
def loudspeaker(sample_rate: int) -> Iterator[BinaryIO]:
    """A stream that plays the 16-bit mono PCM written to it. SystemExit if no player is installed."""
    command = next((c for c in PLAYERS if shutil.which(c[0])), None)
    if not command:
        raise SystemExit(f"--play needs one of {', '.join(c[0] for c in PLAYERS)}; there is also --stdout")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as player:
        length = 0x7FFFFFFF  # of the wav: not known yet
        with contextlib.suppress(BrokenPipeError):
            player.stdin.write(struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", length, b"WAVEfmt ", 16, 1, 1, sample_rate,
                                           2 * sample_rate, 2, 16, b"data", length - 36))
            yield player.stdin
            player.stdin.close()
        with contextlib.suppress(KeyboardInterrupt):  # the wave is whole, though the player still holds its end
            if player.wait():
                print(f"{command[0]} ended with {player.returncode}: is there a sound device?", file=sys.stderr)
