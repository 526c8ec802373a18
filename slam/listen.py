"""A page to listen to: prompts in rows, checkpoints in columns, players, spectrograms and transcripts; one file.

    listen.page("Two checkpoints", {"temperature": 0.8}, ["lm", "dpo"], rows) -> the text of an HTML file

Everything is in it (audio as FLAC, pictures as PNG), so it can be sent to somebody or kept beside a paper.
"""
import base64
import html
import io
import re
from dataclasses import dataclass, field

import numpy as np
import soundfile

from slam.mel import png, spectrogram


@dataclass
class Clip:
    """Something to listen to."""
    wave: np.ndarray  # (T,) float32
    sample_rate: int
    prompt_text: str = ""  # what is heard in the prompt's part of it
    text: str = ""  # and in the rest
    starts: float = 0.0  # seconds of the prompt; the rest is the continuation
    note: str = ""  # below it: its file, say


@dataclass
class Row:
    """A prompt and what became of it."""
    name: str
    prompt: Clip | None  # None: there was none
    cells: list[list[Clip]] = field(default_factory=list)  # for each column, one clip or several


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(clip: Clip, width: int = 640) -> bytes:
    """The spectrogram as a PNG, no wider than `width`."""
    levels = spectrogram(clip.wave, clip.sample_rate)
    step = -(-levels.shape[1] // width)
    levels = np.pad(levels, ((0, 0), (0, -levels.shape[1] % step)), mode="edge")
    return png((levels.reshape(len(levels), -1, step).max(2) // 8 * 8).astype(np.uint8))  # 32 levels compress well


def player(clip: Clip) -> str:
    """A clip as HTML."""
    audio, seconds = io.BytesIO(), len(clip.wave) / clip.sample_rate
    soundfile.write(audio, clip.wave, clip.sample_rate, format="FLAC", subtype="PCM_16")
    share, said = 100 * clip.starts / seconds, []
    if clip.starts and (clip.prompt_text or clip.text):
        said = [("prompt", clip.prompt_text), ("new", clip.text)]
    elif clip.text or clip.prompt_text:
        said = [("new", clip.text), ("prompt", clip.prompt_text)]
    words = " ".join(f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in said if text)
    jump = f'<button type="button" data-at="{clip.starts:.3f}">continuation</button>' if clip.starts else ""
    tint = f'<i class="tint" style="width:{share:.3f}%"></i>' if clip.starts else ""
    return f"""<figure>
<div class="spectrogram" role="slider" tabindex="0" aria-label="position" aria-valuemin="0" aria-valuenow="0"
aria-valuemax="{seconds:.2f}"><img alt="spectrogram, {seconds:.1f} s" src="{data_uri('image/png', picture(clip))}">
{tint}<i class="head"></i></div>
<div class="controls"><audio controls preload="metadata" src="{data_uri('audio/flac', audio.getvalue())}"></audio>{jump}
</div><figcaption>{f'<p class="words">{words}</p>' if words else ''}<small>{seconds:.1f} s{
    ' · ' + html.escape(clip.note) if clip.note else ''}</small></figcaption></figure>"""


def page(title: str, settings: dict, columns: list[str], rows: list[Row]) -> str:
    """The whole page. Lines of a column's text after the first are its details."""
    heads = "".join("<th scope='col'>" + "<br>".join([f"<b>{html.escape(first)}</b>", *(
        f"<small>{html.escape(line)}</small>" for line in more)]) + "</th>"
        for first, *more in (c.splitlines() for c in columns))
    body = "".join(f"<tr><th scope='row'><b>{html.escape(row.name)}</b>{player(row.prompt) if row.prompt else ''}</th>"
                   + "".join("<td>" + "".join(map(player, cell)) + "</td>" for cell in row.cells) + "</tr>"
                   for row in rows)
    facts = "".join(f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd></div>"
                    for k, v in settings.items())
    legend = 'In colour: what is heard in the <span class="prompt">prompt</span> and in the ' \
        '<span class="new">continuation</span>. ' if 'class="words"' in body else ""
    parts = {"title": html.escape(title), "legend": legend, "facts": facts, "heads": heads, "body": body}
    return re.sub("{(title|legend|facts|heads|body)}", lambda match: parts[match[1]], TEMPLATE)


TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --prompt: light-dark(#1d4ed8, #93b4ff); --new: light-dark(#b4430a, #ffa466);
        --line: light-dark(#d8d8de, #3a3a42); --soft: light-dark(#5d5d68, #a5a5b0) }
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 0 .3rem }
small, dl { color: var(--soft); font-weight: normal }
dl { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: .6rem 0 1rem; font-size: .85rem }
dt { display: inline; font-weight: 600 } dd { display: inline; margin: 0 0 0 .35rem }
.table { overflow-x: auto }
table { border-collapse: collapse; width: 100%; table-layout: fixed; min-width: calc(19rem * var(--columns)) }
th, td { text-align: left; vertical-align: top; padding: .7rem .8rem; border-top: 1px solid var(--line);
         overflow-wrap: anywhere }
th { font-weight: normal } thead th { border-top: 0 }
figure { margin: .4rem 0 1.3rem }
.spectrogram { position: relative; height: 84px; cursor: pointer; border-radius: 4px; overflow: hidden }
.spectrogram img { width: 100%; height: 100%; display: block }
.spectrogram:focus-visible { outline: 2px solid var(--new); outline-offset: 2px }
.tint { position: absolute; inset: 0 auto 0 0; background: rgb(80 130 255 / .28); border-right: 2px solid #9db9ff }
.head { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #fff; visibility: hidden }
.controls { display: flex; gap: .5rem; align-items: center; margin: .35rem 0 .2rem }
audio { height: 34px; flex: 1; min-width: 0 }
button { font: inherit; font-size: .85rem; padding: .25rem .6rem; border-radius: 1rem; border: 1px solid var(--new);
         color: var(--new); background: none; cursor: pointer; white-space: nowrap }
.words { margin: .2rem 0 }
.prompt { color: var(--prompt) } .new { color: var(--new) }
</style></head><body>
<h1>{title}</h1>
<div>{legend}A click into a spectrogram plays from there.</div>
<dl>{facts}</dl>
<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>
<script>
document.documentElement.style.setProperty("--columns", document.querySelectorAll("thead th").length);
const players = [...document.querySelectorAll("figure")].map(figure => {
  const audio = figure.querySelector("audio"), picture = figure.querySelector(".spectrogram");
  const head = figure.querySelector(".head");
  let frame;
  const show = () => {
    cancelAnimationFrame(frame);
    head.style.visibility = "visible";
    head.style.left = 100 * audio.currentTime / (audio.duration || 1) + "%";
    picture.setAttribute("aria-valuenow", audio.currentTime.toFixed(2));
    if (!audio.paused) frame = requestAnimationFrame(show);
  };
  const play = () => audio.play().catch(() => {});  // another one may be asked for before this one begins
  const playFrom = seconds => { audio.currentTime = seconds; play(); };
  audio.addEventListener("play", () => {
    players.forEach(other => other !== audio && other.pause());  // one at a time
    show();
  });
  audio.addEventListener("seeked", show);
  picture.addEventListener("click", event => {
    const box = picture.getBoundingClientRect();
    playFrom((event.clientX - box.left) / box.width * audio.duration);
  });
  picture.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) audio.currentTime += step;
    else if (event.key === " " || event.key === "Enter") audio.paused ? play() : audio.pause();
    else return;
    event.preventDefault();
  });
  figure.querySelector("button")?.addEventListener("click", event => playFrom(+event.target.dataset.at));
  return audio;
});
</script></body></html>
"""
