"""slam/listen.py: the page to listen to, in a real browser if there is one."""
import base64
import html
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
from conftest import Process

from slam.listen import Clip, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RATE = 16_000


def clip(seconds: float, **more) -> Clip:
    """A tone that rises for so many seconds."""
    t = np.arange(round(seconds * RATE)) / RATE
    return Clip(0.5 * np.sin(2 * np.pi * (200 + 300 * t) * t).astype(np.float32), RATE, **more)


@pytest.fixture(scope="module")
def clips():
    """Two prompts, each with two continuations by two checkpoints: [prompt][column][k], the prompt's own first."""
    return [[[clip(1.5 + i, prompt_text=f"prompt {i} & <more>")],
             *([clip(2.5 + i + 0.1 * j + 0.2 * k, prompt_text=f"prompt {i} & <more>", text=f"new {i}{j}{k}",
                     starts=1.5 + i, note=f"{i}_{k}.wav") for k in range(2)] for j in range(2))] for i in range(2)]


@pytest.fixture(scope="module")
def text(clips):
    return page("Two prompts", {"top k": 25}, ["prompt", "lm\nout/lm", "dpo\nout/dpo"],
                [(f"{i}.wav", row) for i, row in enumerate(clips)])


def test_the_page_holds_it_all(text, clips):
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing outside it
    sounds = [soundfile.read(io.BytesIO(base64.b64decode(x)))[0]
              for x in re.findall(r'src="data:audio/flac;base64,([^"]+)"', text)]
    flat = [x for row in clips for cell in row for x in cell]
    assert len(sounds) == len(flat) == 10
    for sound, x in zip(sounds, flat):
        np.testing.assert_allclose(sound, x.wave, atol=1e-4)
        assert html.escape(x.prompt_text) in text and x.text in text and x.note in text
    assert text.count(">continuation</button>") == 8 and text.count('class="tint"') == 8
    assert "top k 25" in text and "<small>out/dpo</small>" in text


def test_what_a_page_shows_is_only_text():
    text = page("<b>$body", {"$body": "<script>"}, ["prompt", "a & b\n<i>"],
                [("${facts}<x>", [[], [clip(1, text="</td>$heads")]])])
    assert "<b>$body" not in text and "&lt;b&gt;$body" in text and "a &amp; b" in text and "<x>" not in text
    assert text.count("<script>") == 1 and "&lt;/td&gt;$heads" in text and text.count("<td>") == 1


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
def test_the_page_in_a_browser(text, clips, tmp_path):
    """Everything loads, is where it belongs, and plays, one at a time, from where it is asked to."""
    (tmp_path / "listen.html").write_text(text, encoding="utf-8")
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=(tmp_path / "listen.html").as_uri())
        browser.wait("document.readyState === 'complete' && document.querySelectorAll('audio').length === 10")
        browser.wait("[...document.querySelectorAll('audio')].every(a => a.duration > 1)")
        lengths = browser.eval("[...document.querySelectorAll('td audio')].map(a => a.duration)")
        expected = [len(x.wave) / RATE for row in clips for cell in row[1:] for x in cell]
        assert sorted(lengths) == pytest.approx(sorted(expected), abs=0.02)
        assert browser.eval("[...document.images].every(i => i.complete && i.naturalHeight === 80)")
        assert browser.eval("[...document.querySelectorAll('tbody tr')].map(r => r.cells.length)") == [3, 3]
        # The tint ends where the prompt does; both colours are there, and differ.
        starts = clips[0][1][0].starts
        share = browser.eval("(() => { const t = document.querySelector('td .tint'); "
                             "return t.offsetWidth / t.parentElement.offsetWidth })()")
        assert share == pytest.approx(starts / expected[0], abs=0.02)
        colours = browser.eval("['.prompt', '.new'].map(c => getComputedStyle(document.querySelector(c)).color)")
        assert colours[0] != colours[1]
        assert browser.eval("document.documentElement.scrollWidth <= innerWidth")
        # The button plays from the continuation, a click into another's picture from there; the first then stops.
        browser.click("td button")
        browser.wait("!document.querySelector('td audio').paused")
        assert browser.eval("document.querySelector('td audio').currentTime") >= starts - 0.01
        browser.click("th .spectrogram", 0.5)
        browser.wait("!document.querySelector('th audio').paused && document.querySelector('td audio').paused")
        assert browser.eval("(a => a.currentTime / a.duration)(document.querySelector('th audio'))") >= 0.49
        assert browser.eval("getComputedStyle(document.querySelector('th .head')).visibility") == "visible"
        assert not browser.problems
    finally:
        browser.process.kill()
        browser.process.end()
