"""synth_stories.py: the same seed gives the same files, also after a kill."""
import csv
import hashlib
import importlib.util
import json
import re
import signal
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import soundfile
from conftest import SYNTH, refused, run, start

from slam.audio import load_audio
from slam.benchmarks import read_manifest
from slam.metrics import auto_bleu, word_error_rate
from slam.pair_data import SIDES, read_swag
from slam.speech import continuation_scores, transcribe
from slam.spoken_pairs import GRAMMAR, NAMES, exchange, grammar_pair, make_sblimp, make_sstorycloze, write_benchmark
from slam.tokenizer import SpeechTokenizer
from slam.tts import _start_worker
from slam.units import UnitReader, published_fingerprint, read_pairs
from slam.vocoder import Vocoder
from synth_stories import Config, opening, split_sentences, tidy


def test_split_and_tidy():
    assert split_sentences('Hi. "Go!" He ran') == ["Hi.", '"Go!"']
    story = "One came. Two went home. Three ate an apple. Four slept well. Five woke up. And six"
    assert tidy(story) == split_sentences(story)
    assert tidy("Too short. Only two.") is None
    assert tidy(story.replace("Five woke up.", "Four slept well.")) is None  # repeats itself
    assert tidy(story.replace("apple", "apple 🍎")) is None


def test_openings_differ():
    rng = np.random.default_rng(0)
    openings = [opening(rng) for _ in range(200)]
    assert len(set(openings)) == 200 and all(len(split_sentences(o)) == 3 for o in openings)


def test_exchange_leaves_nothing_in_place():
    for n in (2, 3, 10):
        out = exchange(list(range(n)), seed=1)
        assert sorted(out) == list(range(n)) and all(i != x for i, x in enumerate(out))


def test_grammar_pairs():
    rng = np.random.default_rng(0)
    for kind in GRAMMAR:
        for i in range(24):
            good, bad = grammar_pair(kind, i, rng)
            assert good != bad and good.endswith(".") and abs(len(good.split()) - len(bad.split())) <= 1
    # either member of a minimal pair is right in half of the cases, so the words alone give nothing away
    good = [grammar_pair("subject_verb_agreement", i, rng)[0].split() for i in range(200)]
    plural = sum(any(w in ("are", "were", "have") for w in g) for g in good)
    assert plural == 100


def digest(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".wav", ".flac", ".jsonl")}


def test_what_there_is(stories):
    train, val = UnitReader(stories / "units" / "train"), UnitReader(stories / "units" / "val")
    assert len(train) == 6 and len(val) == 4 and not set(train.ids()) & set(val.ids())
    for split, reader in (("train", train), ("val", val)):
        fingerprint, pairs = read_pairs(stories / f"pairs_{split}.jsonl")
        assert fingerprint == reader.fingerprint and len(pairs) == len(reader)
        texts = {r["id"]: r["text"] for r in reader.records()}
        for pair in pairs:
            own = texts[pair["id"]]
            assert f"{pair['prompt_text']} {pair['chosen_text']}" in own and pair["rejected_text"] not in own
    for name, n in (("tstorycloze", 4), ("sblimp", 8)):
        pairs = [json.loads(x) for x in (stories / name / "manifest.jsonl").read_text().splitlines()]
        assert len(pairs) == n
        for pair in pairs:
            for side in ("positive", "negative"):
                wave, rate = soundfile.read(stories / name / pair[side])
                assert rate == 16_000 and 0.5 < len(wave) / rate < 60 and np.abs(wave).max() > 0.05
    assert {p["type"] for p in pairs} == set(GRAMMAR)
    assert len(list((stories / "audio").glob("*.flac"))) == 10


def test_killed_and_resumed_gives_the_same_files(stories, tmp_path):
    """kill -9 while it writes and again while it speaks; then resumed: every file as of the undisturbed run."""
    out = tmp_path / "data"
    command = ["synth_stories.py", "config/demo_stories.py", f"--out={out}", *SYNTH]
    for moment in (lambda: (out / "stories.jsonl").exists(), lambda: len(list((out / "audio").glob("*.flac"))) > 5):
        process = start(*command)
        process.until(moment)
        process.kill()
        assert process.end().returncode == -signal.SIGKILL
    run(*command)
    assert digest(out) == digest(stories)
    for split in ("train", "val"):
        a, b = UnitReader(out / "units" / split), UnitReader(stories / "units" / split)
        assert a.ids() == b.ids() and all((a.tokens(i) == b.tokens(i)).all() for i in range(len(a)))


def test_refusals(stories, tmp_path):
    error = refused("synth_stories.py", "config/demo_stories.py", f"--out={stories}", *SYNTH, "--seed=7")
    assert "seed was 0, now 7" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    assert "not made by" in refused("synth_stories.py", f"--out={tmp_path / 'mine'}")
    assert "not made by" in refused("synth_stories.py", f"--out={tmp_path / 'mine'}", "--overwrite")
    assert (tmp_path / "mine" / "precious.txt").exists()
    assert "did you mean" in refused("synth_stories.py", "config/demo_storys.py")
    assert "n_train" in refused("synth_stories.py", "--n_trian=5")


COLUMNS = "video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,distractor-0,label"


def swag_row(sent1: str, endings: str, label, source="gold", sent2="She") -> list[str]:
    return ["lsmdc1", "1", f"{sent1} {sent2}", sent1, sent2, source, *endings.split("|"), "n/a", str(label)]


def write_swag(path, rows: list[list[str]], columns: str = COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerows([columns.split(","), *rows])
    return path


ROWS = [swag_row("A woman opens the door.", 'walks into, or "enters", the house.|eats a car.|flies.|sleeps.', 0),
        swag_row("A man  picks up a ball.", "sings.|throws it to his dog.|drinks the moon.|melts.", 1, sent2="He"),
        swag_row("Somebody smiles.", "runs.|sits.|falls.|nods.", 2, source="gen"),
        swag_row("The same the same the same", "the same|a|b|c", 0),  # repetitive
        swag_row("The boy swims.", "a|b|c|d", 7), swag_row("", "a|b|c|d", 1), swag_row("No ending.", "a||c|d", 1),
        swag_row("The boy swims in the lake.", "gets cold.|is a table.|reads the water.|paints.", 3),
        ["short", "row"],
        swag_row("Some cats sit on a wall.", "jump.|read.|glow.|sail.", 0, sent2="They")]


def test_swag_rows_become_pairs(tmp_path):
    cfg = Config(tts="kokoro", tokenizer="x")
    pairs, skipped = read_swag(write_swag(tmp_path / "train.csv", ROWS), cfg)
    assert dict(skipped) == {"not gold": 2, "repetitive": 1, "malformed": 3}  # a short row has no source
    assert [p["prompt_text"] for p in pairs] == ["A woman opens the door.", "A man picks up a ball.",
                                                 "The boy swims in the lake.", "Some cats sit on a wall."]
    assert pairs[0]["chosen_text"] == 'She walks into, or "enters", the house.'
    assert pairs[1]["chosen_text"] == "He throws it to his dog."
    wrong = {"He sings.", "He drinks the moon.", "He melts."}
    drawn = [read_swag(tmp_path / "train.csv", Config(tts="kokoro", seed=seed))[0][1] for seed in range(40)]
    assert {p["rejected_text"] for p in drawn} == wrong
    assert {p["speaker"] for p in drawn} == {"af_heart", "am_fenrir", "bf_emma", "bm_george"}
    assert pairs == read_swag(tmp_path / "train.csv", cfg)[0]
    # The bound is strict.
    text = f"{pairs[0]['prompt_text']} {pairs[0]['chosen_text']}"
    twice = write_swag(tmp_path / "t.csv", [swag_row("A dog. A dog.", "barks at me.|a|b|c", 0)])
    value = auto_bleu("A dog. A dog. She barks at me.")
    assert 0 < value < 1 and auto_bleu(text) == 0
    assert len(read_swag(twice, Config(max_auto_bleu=value))[0]) == 0
    assert len(read_swag(twice, Config(max_auto_bleu=value + 1e-9))[0]) == 1


def test_swag_files_that_are_none(tmp_path):
    def refusal(path):
        with pytest.raises(SystemExit) as e:
            read_swag(str(path), Config())
        return str(e.value)

    assert "not readable" in refusal(tmp_path / "nowhere.csv")
    regular = write_swag(tmp_path / "regular.csv", [], COLUMNS.replace("gold-source", "x"))
    assert "no column gold-source" in refusal(regular)
    (tmp_path / "binary.csv").write_bytes(COLUMNS.encode() + b"\n\xff\xfe")
    assert "not CSV" in refusal(tmp_path / "binary.csv")
    (tmp_path / "quote.csv").write_text(COLUMNS + '\na,"b"c,d\n')
    assert "not CSV" in refusal(tmp_path / "quote.csv")
    assert "hibari has american, not bf_emma" in refused("synth_stories.py", "--voices=bf_emma")


def test_swag_is_spoken_and_resumed(tmp_path):
    """Prompt, chosen and rejected are units of what their texts say; a killed run ends as one that was not."""
    swag, out = write_swag(tmp_path / "train.csv", ROWS), tmp_path / "pairs"
    command = ["synth_stories.py", f"--swag={swag}", "--n_val=1", "--workers=1", f"--out={out}"]
    said = run(*command).stdout
    assert "10 rows, of which were skipped: 2 not gold, 1 repetitive, 3 malformed" in said
    fingerprint, train = read_pairs(out / "pairs_train.jsonl")
    _, val = read_pairs(out / "pairs_val.jsonl")
    assert len(train) == 3 and len(val) == 1 and not {p["id"] for p in train} & {p["id"] for p in val}
    tokenizer = SpeechTokenizer.load("embedded")
    assert fingerprint == tokenizer.fingerprint
    vocoder = Vocoder.load()
    heard = transcribe([vocoder.synthesize(train[0][side])[0] for side in ("prompt", "chosen")],
                       "embedded:whisper-tiny.en")
    for side, text in zip(("prompt", "chosen"), heard):
        wrong, n = word_error_rate(train[0][f"{side}_text"], text)
        assert wrong <= n / 3, (train[0], heard)
    # Killed while it spoke: two pairs are kept, and half of a third one's line.
    whole = (out / "pairs_train.jsonl").read_text()
    lines = whole.splitlines(keepends=True)[1:]
    (out / "pairs_train.jsonl").unlink()
    (out / "pairs_train.jsonl.kept").write_text("".join(lines[:2]) + lines[2][:40])
    run(*command)
    assert (out / "pairs_train.jsonl").read_text() == whole and not (out / "pairs_train.jsonl.kept").exists()
    assert "usable rows" in refused(*command[:2], "--n_val=4", f"--out={tmp_path}/few")


def test_a_tts_that_is_not_there(tmp_path):
    if importlib.util.find_spec("kokoro"):
        pytest.skip("kokoro is installed")
    swag = write_swag(tmp_path / "train.csv", ROWS)
    assert "pip install kokoro" in refused("synth_stories.py", f"--swag={swag}", "--tts=kokoro", "--n_val=1",
                                           f"--out={tmp_path}/x")


def test_spoken_swag_of_the_hub(stories, tmp_path):
    """Parquet in slprl/SpokenSwag's columns, real speech in it: units as of the files alone; resumed after a kill."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    wavs = sorted((stories / "sblimp").glob("*.wav"))

    def row(i: int, **more):
        audio = {side: {"bytes": wavs[3 * i + j].read_bytes(), "path": f"{side}.wav"} for j, side in enumerate(SIDES)}
        return {"speaker": "af_heart", "prompt_text": f"Prompt {i}", "chosen_text": f"Chosen {i}",
                "rejected_text": f"Rejected {i}", "auto_bleu2": 0.0} | audio | more

    folder = tmp_path / "SpokenSwag" / "data"
    folder.mkdir(parents=True)
    # The data set's own auto-BLEU decides; where it has none, it is counted.
    again = {"prompt_text": "a b a b"}
    rows = {"train-00000-of-00002": [row(0, auto_bleu2=0.29, **again), row(1, auto_bleu2=0.3), row(2)],
            "train-00001-of-00002": [row(3, rejected={"bytes": b"junk", "path": None}), row(4, auto_bleu2=None),
                                     row(4, auto_bleu2=None, **again)],
            "validation-00000-of-00001": [row(0), row(1)]}
    for name, part in rows.items():
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=1)
    command = ["synth_stories.py", f"--swag={folder.parent}", "--tts=kokoro", "--n_val=1", f"--out={tmp_path}/pairs"]
    said = run(*command).stdout
    assert "8 rows, of which were skipped: 2 repetitive" in said and "3 pairs; 1 gave no sound" in said
    _, train = read_pairs(tmp_path / "pairs" / "pairs_train.jsonl")
    _, val = read_pairs(tmp_path / "pairs" / "pairs_val.jsonl")
    assert [p["id"] for p in train] == [f"data/train-0000{x}-of-00002/000000{i}" for x, i in ((0, 0), (0, 2), (1, 1))]
    assert len(val) == 1 and val[0]["id"].startswith("data/validation")
    tokenizer = SpeechTokenizer.load("embedded")
    for j, side in enumerate(SIDES):
        assert train[1][side] == tokenizer.encode(load_audio(wavs[6 + j]), 16_000)[0].tolist()
        assert train[1][f"{side}_text"] == f"{side.capitalize()} 2"
    whole = (tmp_path / "pairs" / "pairs_train.jsonl").read_text()
    (tmp_path / "pairs" / "pairs_train.jsonl").unlink()
    (tmp_path / "pairs" / "pairs_train.jsonl.kept").write_text(whole.splitlines(keepends=True)[1])
    run(*command)
    assert (tmp_path / "pairs" / "pairs_train.jsonl").read_text() == whole
    (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1 no")
    assert "not a whole parquet file" in refused(*command, f"--out={tmp_path}/other")
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": 1}]), folder / "train-00001-of-00002.parquet")
    assert "no column chosen" in refused(*command, f"--out={tmp_path}/another")


def test_slamkits_pairs(tmp_path):
    """Its feature extractor's JSON lines: units with durations, or as text; runs are merged."""
    def row(i: int, **more):
        return {"prompt_path": "p.wav", "chosen_path": "c.wav", "rejected_path": "r.wav",
                "prompt": {"audio_repr": {"units": [i, i, 5], "duration": [1, 2, 1]}},
                "chosen": {"audio_repr": f"<Un{i}><Un9>"}, "rejected": {"units": [3, 3, 4]}} | more

    path = tmp_path / "swag.jsonl"
    rows = [row(i, prompt_text="It is.", chosen_text="So he said" if i else "It is. It is.") for i in range(5)]
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    command = ["synth_stories.py", f"--swag={path}", "--n_val=1", f"--out={tmp_path}/pairs"]
    done = run(*command)
    assert "5 rows, of which were skipped: 1 repetitive" in done.stdout
    assert f"{path} does not name its tokeniser; its units are taken to be of slprl/mhubert-base-25hz" in done.stderr
    fingerprint, train = read_pairs(tmp_path / "pairs" / "pairs_train.jsonl")
    _, val = read_pairs(tmp_path / "pairs" / "pairs_val.jsonl")
    assert fingerprint == published_fingerprint(502) and len(train) == 3 and len(val) == 1
    for pair in train + val:
        i = int(pair["id"].removeprefix("swag/"))
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([i, 5], [i, 9], [3, 4])
        assert pair["chosen_text"] == "So he said"
    assert "does not name" not in run(*command, "--tokenizer=embedded", f"--out={tmp_path}/named").stderr
    named, again = read_pairs(tmp_path / "named" / "pairs_train.jsonl")
    assert named == SpeechTokenizer.load("embedded").fingerprint and again == train
    path.write_text(path.read_text() + json.dumps(row(500)) + "\n")
    assert "line 6: not a pair with units" in refused(*command, f"--out={tmp_path}/x")
    path.write_text('{"prompt_path": "p.wav"}\n')
    assert "line 1: not a pair with units (KeyError('prompt'))" in refused(*command, f"--out={tmp_path}/y")


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
    with ThreadPool(1, _start_worker, ("hibari",)) as pool:
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


def test_too_many_sentences_for_the_templates(stories, tmp_path):
    with pytest.raises(SystemExit, match="different pairs, not 9,000"):
        make_sblimp(Config(n_sblimp=9_000, out=str(tmp_path)), None)


def test_a_benchmark_without_pairs_is_an_empty_manifest(tmp_path):
    write_benchmark(Config(out=str(tmp_path / "new")), None, "sstorycloze", [], {}, None)
    assert (tmp_path / "new" / "sstorycloze" / "manifest.jsonl").read_text() == ""
