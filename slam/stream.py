"""slam.stream."""
import contextlib
import queue
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np
import torch

from slam.units import to_units


# ---------------------------------------------------------------- aloud, while it is being made
def stream(cfg, speaker, prompt: list[int], sink: BinaryIO) -> tuple[list[int], np.ndarray, float]:
    """Speak prompt and continuation into `sink` as 16-bit PCM, each piece as soon as it is settled.

    The language model draws in a thread of its own. Returns what `draw` and `say` would: tokens, wave, seconds.
    """
    parts, enough, drawn, failed = queue.Queue(), threading.Event(), [], []

    def progress(new: torch.Tensor) -> bool:
        row = to_units(new[0].tolist())
        parts.put(speaker.tokenizer.to_units(row[len(drawn):]))
        drawn.extend(row[len(drawn):])
        return enough.is_set()

    def draw() -> None:
        try:
            speaker.draw(cfg, [prompt], progress=progress)
        except BaseException as e:  # of any kind: it is raised again where somebody sees it
            failed.append(e)
        parts.put(None)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    vocoder, before = speaker.vocoder, speaker.tokenizer.to_units(prompt)
    began = vocoder.predict_durations(before).sum() * vocoder.hop if before else 0  # about
    limit = began + round(cfg.continuation_seconds * vocoder.sample_rate)
    pieces, n = [np.zeros(0, np.float32)], 0
    try:
        for wave in vocoder.stream(chain([before], iter(parts.get, None))):
            wave = wave[:limit - n]
            pieces, n = [*pieces, wave], n + len(wave)
            sink.write((wave * 32767).round().astype("<i2").tobytes())
            sink.flush()
            if n >= limit:
                break
    except (BrokenPipeError, KeyboardInterrupt):
        print("nobody listens any more; what was said is kept", file=sys.stderr)
    finally:
        enough.set()
        thread.join()
    if failed:
        raise failed[0]
    starts = vocoder.predict_durations(before + speaker.tokenizer.to_units(drawn))[:len(before)].sum() if before else 0
    return list(drawn), np.concatenate(pieces), float(starts) * vocoder.hop / vocoder.sample_rate


PLAYERS = (["aplay", "-q", "-"], ["ffplay", "-nodisp", "-autoexit", "-loglevel", "quiet", "-"],
           ["mpv", "--really-quiet", "-"], ["play", "-q", "-t", "wav", "-"])  # each reads a wav from its input


@contextlib.contextmanager
def loudspeaker(sample_rate: int) -> Iterator[BinaryIO]:
    """Something to write 16-bit PCM to that plays it. SystemExit if there is no player."""
    command = next((c for c in PLAYERS if shutil.which(c[0])), None)
    if not command:
        raise SystemExit(f"--play needs one of {', '.join(c[0] for c in PLAYERS)}; there is also --stdout")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as player:
        unknown = 0x7FFFFFFF  # the length of a wav that is still being made
        player.stdin.write(struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", unknown, b"WAVEfmt ", 16, 1, 1, sample_rate,
                                       2 * sample_rate, 2, 16, b"data", unknown - 36))
        with contextlib.suppress(BrokenPipeError):
            yield player.stdin
            player.stdin.close()
    if player.returncode:
        print(f"{command[0]} ended with {player.returncode}: is there a sound device?", file=sys.stderr)
