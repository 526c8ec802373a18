"""Preference pairs of SWAG, SpokenSwag and SlamKit: which rows become pairs, and that a killed run loses none."""
import copy
import csv
import json

import pytest
from conftest import refused, run

from slam.audio import load_audio
from slam.metrics import auto_bleu, word_error_rate
from slam.pair_data import SIDES, read_swag, usable
from slam.speech import transcribe
from slam.tokenizer import SpeechTokenizer
from slam.tts import TTS
from slam.units import published_fingerprint, read_pairs, sha256_of
from slam.vocoder import Vocoder

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


def swag_pairs(path, seed=0, max_auto_bleu=0.3):
    return usable(read_swag(path, seed, TTS["kokoro"][1]), max_auto_bleu)


def test_swag_rows_become_pairs(tmp_path):
    pairs, skipped = swag_pairs(write_swag(tmp_path / "train.csv", ROWS))
    assert dict(skipped) == {"not gold": 2, "repetitive": 1, "malformed": 3}  # a short row has no source
    assert [p["prompt_text"] for p in pairs] == ["A woman opens the door.", "A man picks up a ball.",
                                                 "The boy swims in the lake.", "Some cats sit on a wall."]
    assert pairs[0]["chosen_text"] == 'She walks into, or "enters", the house.'
    assert pairs[1]["chosen_text"] == "He throws it to his dog."
    wrong = {"He sings.", "He drinks the moon.", "He melts."}
    drawn = [swag_pairs(tmp_path / "train.csv", seed)[0][1] for seed in range(40)]
    assert {p["rejected_text"] for p in drawn} == wrong
    assert {p["speaker"] for p in drawn} == {"af_heart", "am_fenrir", "bf_emma", "bm_george"}
    assert pairs == swag_pairs(tmp_path / "train.csv")[0]
    # The bound is strict.
    text = f"{pairs[0]['prompt_text']} {pairs[0]['chosen_text']}"
    twice = write_swag(tmp_path / "t.csv", [swag_row("A dog. A dog.", "barks at me.|a|b|c", 0)])
    value = auto_bleu("A dog. A dog. She barks at me.")
    assert 0 < value < 1 and auto_bleu(text) == 0
    assert len(swag_pairs(twice, max_auto_bleu=value)[0]) == 0
    assert len(swag_pairs(twice, max_auto_bleu=value + 1e-9)[0]) == 1


def test_swag_files_that_are_none(tmp_path):
    def refusal(path):
        with pytest.raises(SystemExit) as e:
            swag_pairs(str(path))
        return str(e.value)

    assert "not readable" in refusal(tmp_path / "nowhere.csv")
    regular = write_swag(tmp_path / "regular.csv", [], COLUMNS.replace("gold-source", "x"))
    assert "no column gold-source" in refusal(regular)
    (tmp_path / "binary.csv").write_bytes(COLUMNS.encode() + b"\n\xff\xfe")
    assert "not CSV" in refusal(tmp_path / "binary.csv")
    (tmp_path / "quote.csv").write_text(COLUMNS + '\na,"b"c,d\n')
    assert "row 2: not CSV" in refusal(tmp_path / "quote.csv")


def kept_as(pair: dict, tokenizer: SpeechTokenizer) -> str:
    """Under what name a pair's units are kept: that of its tokeniser and texts."""
    texts = {k: v for k, v in pair.items() if k not in SIDES}
    return sha256_of(tokenizer.fingerprint.to_dict(), str(tokenizer.encoder.dtype), texts)


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
    lines = [json.dumps({kept_as(p, tokenizer): [p[side] for side in SIDES]}) for p in train]
    (out / "pairs_train.jsonl").unlink()
    (out / "pairs_train.jsonl.kept").write_text("\n".join(lines)[:-40])
    run(*command)
    assert (out / "pairs_train.jsonl").read_text() == whole and not (out / "pairs_train.jsonl.kept").exists()
    # Another text under a pair's number, and one that can't be spoken: no kept units are taken for it; it is counted.
    (out / "pairs_train.jsonl").unlink()
    (out / "pairs_train.jsonl.kept").write_text("\n".join(lines) + "\n")
    changed = copy.deepcopy(ROWS)
    row = changed[int(train[0]["id"].removeprefix("swag"))]
    row[6 + int(row[-1])] = f"{10 ** 90}."
    write_swag(swag, changed)
    assert f"{len(train) - 1} pairs; 1 gave no sound" in run(*command).stdout
    assert "usable rows" in refused(*command[:2], "--n_val=4", f"--out={tmp_path}/few")


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
    (tmp_path / "pairs" / "pairs_train.jsonl.kept").write_text(
        json.dumps({kept_as(train[1], tokenizer): [train[1][side] for side in SIDES]}) + "\n")
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
