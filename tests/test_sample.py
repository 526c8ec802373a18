"""sample.py: prompts continued aloud, and the page to listen to them, in a real browser if there is one."""
import base64
import html
import io
import json
import os
import re
import select
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import Process, refused, run, start

import sample
from config import load_config
from slam.listen import Clip, Row, page
from slam.tokenizer import EMBEDDED_TOKENIZER, PUBLISHED_KMEANS, find_codebook, write_codebook
from slam.units import Fingerprint, published_fingerprint
from slam.vocoder import EMBEDDED_VOCODER, Vocoder, Vocos, find_vocoder


@pytest.fixture(scope="module")
def prompts(voice, tmp_path_factory):
    """A folder of two prompts: one in stereo at 44.1 kHz, one of twelve seconds."""
    from scipy.signal import resample_poly
    folder = tmp_path_factory.mktemp("prompts")
    fox = voice("Once upon a time, there was a little fox.")
    soundfile.write(folder / "fox.flac", np.stack([resample_poly(fox, 441, 160)] * 2, 1) * 0.9, 44_100)
    soundfile.write(folder / "long.wav", np.tile(voice("The dog went home."), 10)[:12 * 16_000], 16_000)
    return folder


def go(*args) -> None:
    """`python sample.py ARGS` without the seconds that imports take."""
    sample.main(load_config(sample.Config, list(map(str, args))))


def refusal(*args) -> str:
    with pytest.raises(SystemExit) as e:
        go(*args)
    return str(e.value)


def records(folder) -> list[dict]:
    return json.loads((folder / "samples.json").read_text())["samples"]


@pytest.fixture(scope="module")
def compared(runs, prompts, tmp_path_factory):
    """A folder of prompts, continued twice by two checkpoints."""
    out = tmp_path_factory.mktemp("samples") / "s"
    done = run("sample.py", "--prompt", prompts, "--checkpoint", runs / "lm", "--checkpoint", runs / "dpo", "--n=2",
               "--continuation_seconds=2", "--prompt_seconds=3", f"--out={out}", process=True)
    return out, done.stdout


def test_prompts_are_continued_by_checkpoints(compared, runs):
    out, said = compared
    found = records(out)
    assert len(found) == 8 and "long.wav: 12.0 s long; its last 3 s are used" in said
    assert [r["checkpoint"] for r in found] == [f"{runs}/lm"] * 4 + [f"{runs}/dpo"] * 4
    first, second = found[:2]
    assert first["units"] != second["units"] and first["prompt_units"] == second["prompt_units"]
    assert first["prompt_units"] == found[4]["prompt_units"] and "fox" in first["prompt_text"]
    for r in found:
        whole, rate = soundfile.read(r["whole"])
        alone, _ = soundfile.read(r["continuation"])
        assert rate == 16_000 and len(alone) / rate == pytest.approx(2, abs=0.13) and len(alone) <= 2 * rate
        assert (whole[-len(alone):] == alone).all()
        assert len(whole) - len(alone) == round(r["continuation_starts"] * rate) > rate
    assert {p.name for p in out.glob("*.wav")} == {
        f"{i:02d}_{name}_{k}_{label}_{kind}.wav" for i, name in enumerate(("fox", "long")) for k in (0, 1)
        for label in ("lm", "dpo") for kind in ("whole", "continuation")}
    assert "overwrite" in refusal(f"--checkpoint={runs}/lm", f"--out={out}")


def test_the_page_holds_it_all(compared):
    out, _ = compared
    text = (out / "listen.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing outside it
    sounds = [soundfile.read(io.BytesIO(base64.b64decode(x)), dtype="int16")[0]
              for x in re.findall(r'src="data:audio/flac;base64,([^"]+)"', text)]
    wavs = [soundfile.read(r["whole"], dtype="int16")[0] for r in records(out)]
    assert len(sounds) == 10
    for wav in wavs:  # both roundings to 16 bits are libsndfile's, and differ
        assert any(len(wav) == len(s) and abs(wav.astype(int) - s).max() <= 2 for s in sounds)
    for r in records(out):
        assert html.escape(r["continuation_text"]) in text and html.escape(r["prompt_text"]) in text


def test_what_a_page_shows_is_only_text():
    wave = np.sin(np.arange(16_000) * 0.1).astype(np.float32)
    text = page("<b>{rows}", {"{body}": "<script>"}, ["prompt", "a & b\n<i>"],
                [Row("{facts}<x>", None, [[Clip(wave, 16_000, text="</td>{heads}")]])])
    assert "<b>{rows}" not in text and "&lt;b&gt;{rows}" in text and "a &amp; b" in text and "<x>" not in text
    assert text.count("<script>") == 1 and "&lt;/td&gt;{heads}" in text and text.count("<td>") == 1


def test_no_prompt_a_seed_and_greedy(runs, tmp_path):
    """Unconditional, the same with the same seed, another with another."""
    how = ["--continuation_seconds=1.5", "--transcribe=false", f"--checkpoint={runs}/lm"]
    for name, *more in (("a", "--n=2"), ("b", "--n=2"), ("c", "--n=2", "--seed=1"), ("d", "--temperature=0", "--n=2")):
        go(*how, f"--out={tmp_path}/{name}", *more)
    a, b, c, d = ([r["units"] for r in records(tmp_path / name)] for name in "abcd")
    assert a == b != c and a[0] != a[1] and d[0] == d[1]
    first = records(tmp_path / "a")[0]
    assert first["prompt_units"] == [] and first["continuation_starts"] == 0 and "prompt_text" not in first
    assert soundfile.read(first["whole"])[0].tolist() == soundfile.read(first["continuation"])[0].tolist()
    assert "unprompted" in first["whole"] and "unprompted" in (tmp_path / "a" / "listen.html").read_text()


def test_speaks_before_it_knows_the_end(runs, prompts, tmp_path):
    """--stdout: PCM alone, the very samples that are kept; the player of --play gets the same after a wav's header."""
    command = ["sample.py", "--prompt", prompts / "fox.flac", f"--checkpoint={runs}/lm", "--continuation_seconds=4",
               "--transcribe=false"]
    done = run(*command, "--stdout", f"--out={tmp_path}/s", text=False)
    pcm = np.frombuffer(done.stdout, "<i2")
    kept, rate = soundfile.read(tmp_path / "s" / "00_fox_0_whole.wav", dtype="int16")
    assert abs(pcm - kept.astype(int)).max() <= 2 and b"16-bit little-endian PCM, mono, 16000 Hz" in done.stderr
    record, = records(tmp_path / "s")
    alone = soundfile.info(record["continuation"]).duration
    assert record["continuation_starts"] + alone == pytest.approx(len(pcm) / rate, abs=1e-3) and 3.5 < alone < 4.5
    # Without streaming the same is drawn and said.
    go(*command[1:], f"--out={tmp_path}/t")
    plain, _ = soundfile.read(tmp_path / "t" / "00_fox_0_whole.wav")
    n = min(len(plain), len(kept)) - Vocoder.load().context * 640  # they end at different moments
    np.testing.assert_allclose(plain[:n], kept[:n] / 32768, atol=1e-3)
    assert records(tmp_path / "t")[0]["units"][:60] == record["units"][:60]

    player = tmp_path / "bin" / "aplay"  # a program that keeps what it is given
    player.parent.mkdir()
    player.write_text(f"#!/bin/sh\nexec cat > {tmp_path}/played.wav\n")
    player.chmod(0o755)
    run(*command, "--play", f"--out={tmp_path}/p", env=os.environ | {"PATH": f"{player.parent}:{os.environ['PATH']}"})
    content = (tmp_path / "played.wav").read_bytes()
    assert content[:4] == b"RIFF" and content[8:16] == b"WAVEfmt " and content[44:] == done.stdout
    assert "one continuation" in refusal(*command[1:], "--play", "--n=2")
    assert "one or the other" in refusal(*command[1:], "--play", "--stdout")
    env = os.environ | {"PATH": str(tmp_path)}
    silent = run(*command, "--play", f"--out={tmp_path}/q", check=False, env=env)
    assert silent.returncode == 1 and "needs one of aplay" in silent.stderr and "Traceback" not in silent.stderr


def test_a_listener_who_leaves(runs, prompts, tmp_path):
    """A closed pipe ends the speaking, not the program: what was said is kept."""
    process = start("sample.py", f"--prompt={prompts}/fox.flac", f"--checkpoint={runs}/lm", "--stdout",
                    "--continuation_seconds=30", "--transcribe=false", f"--out={tmp_path}/s", stdout=subprocess.PIPE)
    process.until(lambda: select.select([process.stdout], [], [], 0)[0])
    assert process.stdout.read1(1000)
    process.stdout.close()
    done = process.end()
    assert done.returncode == 0 and b"nobody listens" in done.stderr and b"Traceback" not in done.stderr
    assert soundfile.info(records(tmp_path / "s")[0]["whole"]).duration < 30


def test_prompts_that_are_no_speech(runs, voice, tmp_path, capsys):
    rng, t = np.random.default_rng(0), np.arange(3 * 16_000) / 16_000
    cases = {"white": 0.1 * rng.standard_normal(len(t)), "faint": 1e-3 * rng.standard_normal(len(t)),
             "hum": 0.2 * np.sin(2 * np.pi * 50 * t), "silent": np.zeros(len(t)),
             "speech": voice("Good morning, my dear old friend.")}
    for name, wave in cases.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
    how = ["--continuation_seconds=0.5", "--transcribe=false", f"--checkpoint={runs}/lm"]
    files = [f"--prompt={tmp_path}/{name}.wav" for name in ("white", "faint", "hum", "speech")]
    go(*how, *files, f"--out={tmp_path}/s")
    assert re.findall(r"(\w+)\.wav: hardly any speech", capsys.readouterr().err) == ["white", "faint", "hum"]
    assert len(records(tmp_path / "s")) == 4
    silent = refusal(*how, f"--prompt={tmp_path}/silent.wav")
    assert "silent" in silent and "without --prompt" in silent
    soundfile.write(tmp_path / "short.wav", cases["speech"][:500], 16_000)
    assert "at least 40 ms" in refusal(*how, f"--prompt={tmp_path}/short.wav")
    faded = np.concatenate([cases["speech"], np.zeros(32_000)])  # what is used of it is silent
    soundfile.write(tmp_path / "faded.wav", faded, 16_000)
    assert "faded.wav, its last 2 s: silent" in refusal(*how, f"--prompt={tmp_path}/faded.wav", "--prompt_seconds=2")
    (tmp_path / "none").mkdir()
    assert "no audio files in this folder" in refusal(*how, f"--prompt={tmp_path}/none")


def test_bad_prompts_and_checkpoints(runs, prompts, tmp_path):
    assert "no such audio file" in refused("sample.py", "--prompt=nowhere.wav", f"--checkpoint={runs}/lm")
    assert "the same one twice" in refusal("--checkpoint=a,a")
    assert "top_p lies in (0, 1]" in refusal("--top_p=0")
    good, half = f"--prompt={prompts}/fox.flac", tmp_path / "half"
    shutil.copytree(runs / "lm" / "checkpoint", half)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    assert str(half) in refusal(good, f"--checkpoint={half}", f"--out={tmp_path}/s")
    (half / "slam.json").unlink()
    assert "slam.json" in refusal(good, f"--checkpoint={half}", f"--out={tmp_path}/s")


def test_a_prompt_is_said_again_from_its_units(voice, tmp_path):
    wave = voice("Once upon a time, there was a little fox. He lived in a forest.")
    soundfile.write(tmp_path / "p.wav", wave, 16_000)
    done = run("sample.py", f"--prompt={tmp_path}/p.wav", "--resynth", f"--out={tmp_path}/s")
    again, rate = soundfile.read(tmp_path / "s" / "00_p_resynth.wav")
    assert abs(len(again) / rate - len(wave) / 16_000) < 0.1
    record, = records(tmp_path / "s")
    assert "little fox" in record["prompt_text"] and "little fox" in record["resynth_text"]
    assert sum(record["durations"]) == len(wave) // 640 and "units per second" in done.stdout
    assert (tmp_path / "s" / "listen.html").read_text().count("<audio") == 2


# ---------------------------------------------------------------- what goes with a checkpoint

def test_newest_finished_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished checkpoint under out/"):
        sample.newest_checkpoint()
    for i, (name, finished) in enumerate((("a", True), ("b/c", True), ("d", False))):
        folder = tmp_path / "out" / name / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "slam.json").write_text(json.dumps({"finished": finished}))
        os.utime(folder / "slam.json", (i, i))
    assert sample.newest_checkpoint() == "out/b/c"
    cfg = sample.Config()
    assert str(sample.new_folder(cfg)) == "out/samples"
    (tmp_path / "out" / "samples").mkdir()
    assert str(sample.new_folder(cfg)) == "out/samples_2"


def test_labels_are_the_ends_that_differ():
    assert sample.labels(["out/demo/lm", "out/demo/dpo/checkpoint"]) == ["lm", "dpo"]
    assert sample.labels(["out/a/lm", "out/b/lm", "slprl/slam"]) == ["a-lm", "b-lm", "slprl-slam"]
    assert sample.labels(["/x/run"]) == ["run"] and len(set(sample.labels(["/out/lm", "out/lm"]))) == 2


def test_codebook_and_vocoder_are_found_by_fingerprint(tmp_path):
    shipped = Vocoder.load("embedded").fingerprint
    here = str(tmp_path)
    assert (find_codebook(shipped, here), find_vocoder(shipped, folder=here)) == ("embedded", "embedded")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    shutil.copy(EMBEDDED_TOKENIZER, tmp_path / "copy.safetensors")
    meta = {"encoder": "some/encoder", "layer": 3, "unit_rate_hz": 25.0}
    for name in ("x", "y"):
        centroids = torch.full((7, 4), float(ord(name)))
        write_codebook(tmp_path / "deep" / f"{name}.safetensors", {"centroids": centroids}, meta)
    from slam.tokenizer import codebook_fingerprints, read_codebook
    path = str(tmp_path / "deep" / "y.safetensors")
    other, _ = codebook_fingerprints(*read_codebook(path))
    assert find_codebook(other, str(tmp_path)) == path
    with pytest.raises(SystemExit, match="no vocoder below"):
        find_vocoder(other, folder=here)
    Vocos(other, 16, 1).save(tmp_path / "deep" / "v.safetensors")
    assert find_vocoder(other, folder=here) == str(tmp_path / "deep" / "v.safetensors")
    with pytest.raises(SystemExit, match="no codebook below"):
        find_codebook(Fingerprint("some/encoder", 3, 25.0, 8, True, "f"), str(tmp_path))
    published = published_fingerprint(502)
    assert find_vocoder(published, folder=here) == "published"
    fitted = replace(published, codebook_sha256="f" * 64)  # by somebody: other units of the same encoder
    with pytest.raises(SystemExit, match="no vocoder below"):
        find_vocoder(fitted, folder=here)
    assert find_vocoder(fitted, published=True, folder=here) == "published"
    with pytest.raises(SystemExit, match="prepare_units.py convert"):
        find_codebook(published, str(tmp_path))
    meta = {"encoder": published.encoder, "layer": 11, "unit_rate_hz": 25.0}
    write_codebook(tmp_path / "fitted.safetensors", {"centroids": torch.zeros(500, 4)}, meta)
    with pytest.raises(SystemExit, match="no codebook below"):
        find_codebook(published, here)
    write_codebook(tmp_path / "m.safetensors", {"centroids": torch.zeros(500, 4)},
                   meta | {"source_sha256": PUBLISHED_KMEANS[1] + 52 * "0" + PUBLISHED_KMEANS[2]})
    assert find_codebook(published, here) == str(tmp_path / "m.safetensors")
    assert EMBEDDED_VOCODER.is_file()


# ---------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Headless Chromium, driven by its DevTools protocol over two pipes."""

    def __init__(self, folder):
        ours, theirs = os.pipe(), os.pipe()  # to it, from it; it expects them as 3 and 4
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                   "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={folder}", "--window-size=1200,900"]
        self.process = Process(["bash", "-c", f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}', "bash", *command],
                               pass_fds=(ours[0], theirs[1]))
        os.close(ours[0])
        os.close(theirs[1])
        self.to, self.back, self.n, self.session, self.problems = ours[1], os.fdopen(theirs[0], "rb"), 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.n += 1
        message = {"id": self.n, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            content = bytearray()
            while (byte := self.back.read(1)) != b"\0":
                assert byte, "the browser is gone"
                content += byte
            answer = json.loads(content)
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(answer["params"])
            if answer.get("id") == self.n:
                assert "error" not in answer, answer
                return answer["result"]

    def eval(self, code: str):
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, code: str) -> None:
        self.process.until(lambda: self.eval(code))

    def click(self, selector: str, share: float = 0.5) -> None:
        box = self.eval(f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[0]; e.scrollIntoView();"
                        f" const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0] + share * box[2], y=box[1] + box[3] / 2,
                      button="left", clickCount=1)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_in_a_browser(compared, tmp_path):
    """Everything loads, is where it belongs, and plays, one at a time, from where it is asked to."""
    out, _ = compared
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=(out / "listen.html").as_uri())
        browser.wait("document.readyState === 'complete' && document.querySelectorAll('audio').length === 10")
        browser.wait("[...document.querySelectorAll('audio')].every(a => a.duration > 1)")
        lengths = browser.eval("[...document.querySelectorAll('td audio')].map(a => a.duration)")
        expected = [soundfile.info(r["whole"]).duration for r in records(out)]
        assert sorted(lengths) == pytest.approx(sorted(expected), abs=0.02)
        assert browser.eval("[...document.images].every(i => i.complete && i.naturalHeight === 80)")
        assert browser.eval("[...document.querySelectorAll('tbody tr')].map(r => r.cells.length)") == [3, 3]
        # The tint ends where the prompt does; both colours are there, and differ.
        first = records(out)[0]
        share = browser.eval("(() => { const t = document.querySelector('td .tint'); "
                             "return t.offsetWidth / t.parentElement.offsetWidth })()")
        assert share == pytest.approx(first["continuation_starts"] / expected[0], abs=0.02)
        colours = browser.eval("['.prompt', '.new'].map(c => getComputedStyle(document.querySelector(c)).color)")
        assert colours[0] != colours[1]
        assert browser.eval("document.documentElement.scrollWidth <= innerWidth")
        # The button plays from the continuation, a click into another's picture from there; the first then stops.
        browser.click("td button")
        browser.wait("!document.querySelector('td audio').paused")
        assert browser.eval("document.querySelector('td audio').currentTime") >= first["continuation_starts"] - 0.01
        browser.click("th .spectrogram", 0.5)
        browser.wait("!document.querySelector('th audio').paused && document.querySelector('td audio').paused")
        assert browser.eval("(a => a.currentTime / a.duration)(document.querySelector('th audio'))") >= 0.49
        assert browser.eval("getComputedStyle(document.querySelector('th .head')).visibility") == "visible"
        assert not browser.problems
    finally:
        browser.process.kill()
        browser.process.end()
