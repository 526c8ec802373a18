"""slam/stream.py: a continuation spoken while it is being generated, by sample.py."""
import io
import json
import os
import select
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from conftest import run, start

import sample
from config import load_config
from slam.stream import stream
from slam.tokenizer import SpeechTokenizer
from slam.vocoder import Vocoder


@pytest.fixture(scope="module")
def flags(runs, voice, tmp_path_factory):
    """Of sample.py: a prompt and a checkpoint."""
    path = tmp_path_factory.mktemp("prompt") / "fox.wav"
    soundfile.write(path, voice("Once upon a time, there was a little fox."), 16_000)
    return [f"--prompt={path}", f"--checkpoint={runs}/lm", "--transcribe=false"]


def go(*args) -> None:
    """`python sample.py ARGS` without the seconds that imports take."""
    sample.main(load_config(sample.Config, list(map(str, args))))


def record(folder) -> dict:
    found, = json.loads((folder / "samples.json").read_text())["samples"]
    return found


def test_speaks_before_it_knows_the_end(flags, tmp_path, monkeypatch):
    """--stdout: PCM alone, the very samples that are kept; the player of --play gets the same after a wav's header."""
    flags = [*flags, "--continuation_seconds=4"]
    done = run("sample.py", *flags, "--stdout", f"--out={tmp_path}/s", text=False)
    pcm = np.frombuffer(done.stdout, "<i2")
    kept, rate = soundfile.read(tmp_path / "s" / "00_fox_0_whole.wav", dtype="int16")
    assert abs(pcm - kept.astype(int)).max() <= 2 and b"16-bit little-endian PCM, mono, 16000 Hz" in done.stderr
    said = record(tmp_path / "s")
    alone = soundfile.info(said["continuation"]).duration
    assert said["continuation_starts"] + alone == pytest.approx(len(pcm) / rate, abs=1e-3) and 3.5 < alone < 4.5
    # Without streaming the same is drawn and said.
    go(*flags, f"--out={tmp_path}/t")
    plain, _ = soundfile.read(tmp_path / "t" / "00_fox_0_whole.wav")
    n = min(len(plain), len(kept)) - Vocoder.load().context * 640  # they end at different moments
    np.testing.assert_allclose(plain[:n], kept[:n] / 32768, atol=1e-3)
    assert record(tmp_path / "t")["units"][:60] == said["units"][:60]

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="needs one of aplay"):
        go(*flags, "--play", f"--out={tmp_path}/q")
    player = tmp_path / "aplay"  # a program that keeps what it is given
    player.write_text(f"#!/bin/sh\nexec /bin/cat > {tmp_path}/played.wav\n")
    player.chmod(0o755)
    go(*flags, "--play", f"--out={tmp_path}/p")
    content = (tmp_path / "played.wav").read_bytes()
    assert content[:4] == b"RIFF" and content[8:16] == b"WAVEfmt " and content[44:] == done.stdout
    for more, match in (("--n=2", "one continuation"), ("--stdout", "one or the other")):
        with pytest.raises(SystemExit, match=match):
            go(*flags, "--play", more)


def test_ctrl_c_while_the_player_has_the_end(tmp_path):
    """Then all has been written to the player: the program goes on, and keeps it."""
    player = tmp_path / "aplay"
    player.write_text("#!/bin/sh\n/bin/cat > /dev/null\n/bin/sleep 0.3\nkill -INT $PPID\n/bin/sleep 0.3\nexit 1\n")
    player.chmod(0o755)
    done = run("-c", "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job may ignore it
                     "from slam.stream import loudspeaker\nwith loudspeaker(16000) as sink: sink.write(bytes(2000))\n"
                     "print('kept')", env={**os.environ, "PATH": str(tmp_path)})
    assert done.stdout == "kept\n" and not done.stderr


def test_a_listener_who_leaves(flags, tmp_path):
    """A closed pipe ends the speaking, not the program: what was said is kept."""
    process = start("sample.py", *flags, "--stdout", "--continuation_seconds=30", f"--out={tmp_path}/s",
                    stdout=subprocess.PIPE)
    process.until(lambda: select.select([process.stdout], [], [], 0)[0])
    assert process.stdout.read1(1000)
    process.stdout.close()
    done = process.end()
    assert done.returncode == 0 and b"playback was stopped" in done.stderr and b"Traceback" not in done.stderr
    assert soundfile.info(record(tmp_path / "s")["whole"]).duration < 30


def test_the_voice_stays_fp32_under_the_language_models_autocast():
    """On a GPU, units are drawn under autocast, and `progress` is called there."""
    tokenizer, vocoder, tokens = SpeechTokenizer.load("embedded"), Vocoder.load(), torch.arange(2, 98, 3)[None]
    waves = []
    for on in (False, True):
        def draw(progress):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                for n in range(8, 33, 8):
                    progress(tokens[:, :n])

        waves.append(stream(draw, tokenizer, vocoder, [1, 5, 6], 9.0, io.BytesIO())[1])
    assert len(waves[0]) > 16_000 and np.array_equal(*waves)
