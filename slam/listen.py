"""A page to listen to: prompts in rows, checkpoints in columns, players, spectrograms and transcripts; one HTML file.

    listen.page("Two checkpoints", {"temperature": 0.8}, ["prompt", "lm", "dpo"], rows) -> the text of listen.html

The file needs nothing beside it: audio is embedded as FLAC, spectrograms as PNG. The template is slam/listen.html.
"""
import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from slam.mel import png, spectrogram


@dataclass
class Clip:
    """One recording on the page."""
    wave: np.ndarray  # (T,) float32
    sample_rate: int  # Hz
    prompt_text: str = ""  # transcript of the prompt
    text: str = ""  # transcript of the rest
    starts: float = 0.0  # seconds of prompt before the rest
    note: str = ""  # shown below, such as a file name


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def player(clip: Clip) -> str:
    """HTML of a clip: spectrogram with the prompt tinted, player, a button to skip the prompt, transcripts."""
    import soundfile
    audio, seconds = io.BytesIO(), len(clip.wave) / clip.sample_rate
    soundfile.write(audio, clip.wave, clip.sample_rate, format="FLAC", subtype="PCM_16")
    levels = spectrogram(clip.wave, clip.sample_rate)
    levels = levels[:, ::1 + levels.shape[1] // 1500] // 8 * 8  # at most 1,500 columns of 32 levels: a small file
    words = " ".join(f'<span class="{who}">{escape(text)}</span>'
                     for who, text in (("prompt", clip.prompt_text), ("new", clip.text)) if text)
    tint = f'<i class="tint" style="width:{100 * clip.starts / seconds:.3f}%"></i>' if clip.starts else ""
    skip = f'<button type="button" data-at="{clip.starts:.3f}">continuation</button>' if clip.starts else ""
    return f"""<figure><div class="spectrogram">
<img alt="spectrogram" src="{data_uri("image/png", png(levels))}">{tint}<i class="head"></i></div>
<audio controls src="{data_uri("audio/flac", audio.getvalue())}"></audio>{skip}
<figcaption>{words} <small>{seconds:.1f} s {escape(clip.note)}</small></figcaption></figure>"""


def page(title: str, settings: dict, columns: list[str], rows: list[tuple[str, list[list[Clip]]]]) -> str:
    """The page as HTML text; a row: its name and the clips of each column, first the prompt's (none: unprompted).

    columns: their headings; further lines of a heading are in small print.
    """
    heads = [escape(first) + "".join(f"<br><small>{escape(line)}</small>" for line in more)
             for first, *more in map(str.splitlines, columns)]
    cells = [[escape(name), *("".join(map(player, clips)) for clips in row)] for name, row in rows]
    body = [f"<tr><th>{name}{prompt}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
            for name, prompt, *rest in cells]
    facts = escape(" · ".join(f"{name} {value}" for name, value in settings.items()))
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), facts=facts, body="".join(body), width=19 * len(columns),
                               heads="".join(f"<th><b>{head}</b></th>" for head in heads))
