"""sStoryCloze-style pairs (dev/hard_negatives.py): the wrong ending is close, and fits less."""
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "dev"))
from hard_negatives import make_sstorycloze

from slam.benchmarks import read_manifest
from slam.speech import continuation_scores
from synth_stories import Config, read_openings, split_sentences

NAMES = read_openings("assets/openings.json")["name"]


CLOSE = ["Tom had a red ball. He took the ball to the park. He kicked the ball very far. It rolled under a tree. "
         "Tom ran to the tree and found his ball.",
         "Tom saw a big dog in the park. The dog was sleeping under a tree. Tom sat down beside the dog. The dog woke "
         "up and licked his face. Tom laughed, and the dog wagged its tail.",
         "Sam was hungry. Sam went to the kitchen. There was a cake on the table. He ate the cake. Sam was not hungry "
         "any more after the cake.",
         "Mia made soup in the kitchen. The soup was too hot. Mia blew on the soup. Then the soup was cold. Mia put "
         "the cold soup on the table and ate it."]


def test_hard_negatives(tmp_path, capsys):
    """The wrong ending has this story's hero in it, and fits less, in the writer's opinion; none is used twice."""
    stories = [{"id": str(i), "sentences": split_sentences(text)} for i, text in enumerate(CLOSE)]
    with ThreadPoolExecutor(1) as pool:
        make_sstorycloze(Config(out=str(tmp_path / "few")), pool, stories[::3])  # about nothing that they share
        make_sstorycloze(Config(out=str(tmp_path)), pool, stories)
    assert "sstorycloze: 0 pairs; 2 stories have no close ending" in capsys.readouterr().out
    assert "no pairs in it" in str(pytest.raises(SystemExit, read_manifest, f"{tmp_path}/few/sstorycloze").value)
    pairs = read_manifest(str(tmp_path / "sstorycloze")).pairs
    assert 2 <= len(pairs) <= 4
    endings = [re.sub("|".join(NAMES), "", split_sentences(pair["negative_text"])[4]) for pair in pairs]
    assert len(set(endings)) == len(pairs)
    for pair in pairs:
        right, wrong = (split_sentences(pair[f"{side}_text"]) for side in ("positive", "negative"))
        assert right[:4] == wrong[:4] and right[4] != wrong[4]
        beginning = " ".join(right[:4])
        heroes = set(re.findall(r"\w+", wrong[4])) & set(NAMES)
        assert heroes <= {next(w for w in re.findall(r"\w+", beginning) if w in NAMES)}
        fits, less = continuation_scores([beginning] * 2, [right[4], wrong[4]], "embedded:smollm2-135m")
        assert less <= fits - 0.29


def test_it_takes_the_settings_of_the_stories(stories, tmp_path):
    """Of four stories about different things perhaps none has a pair, but there is a set."""
    for name in ("synth.json", "stories.jsonl"):
        (tmp_path / name).write_text((stories / name).read_text())
    assert re.match(r"sstorycloze: [0-4] pairs", run("dev/hard_negatives.py", str(tmp_path), "--workers=1").stdout)
    assert (tmp_path / "sstorycloze" / "manifest.jsonl").exists()
    done = run("dev/hard_negatives.py", str(tmp_path / "sstorycloze"), check=False)
    assert done.returncode == 1 and "synth.json: missing" in done.stderr and "Traceback" not in done.stderr
