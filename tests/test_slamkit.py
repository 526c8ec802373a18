"""slam/slamkit.py: SlamKit's unit files, read and imported."""
import json

import pytest

from prepare_units import Config, main, verify
from slam.slamkit import slamkit_units
from slam.tokenizer import SpeechTokenizer
from slam.units import UnitReader, published_fingerprint


def said(folder) -> dict[str, list[int]]:
    reader = UnitReader(folder)
    return {id: reader.units(i).tolist() for i, id in enumerate(reader.ids())}


def test_units_and_durations():
    units, durations = slamkit_units({"file_name": "a", "audio_repr": "<Un3><Un49>"}, 500)
    assert units.tolist() == [3, 49] and durations is None
    units, durations = slamkit_units({"units": [1, 1, 2], "duration": [2, 3, 1]}, 500)
    assert units.tolist() == [1, 2] and durations.tolist() == [5, 1]
    for bad in ({"units": [500]}, {"units": []}, {"units": [-1]}, {"units": [[1]]}, {"units": [0.5]},
                {"audio_repr": "<Un3> 4"}, {"units": [1, 2], "duration": [1]}, {"units": [1, 2], "duration": [1, 0]}):
        with pytest.raises(ValueError):
            slamkit_units(bad, 500)


def test_files_are_imported(tmp_path, capsys):
    units = [[3, 49, 7], [1, 1, 2]]
    lines = [{"units": units[0], "duration": [2, 1, 4], "file_name": "a.wav"},
             {"audio_repr": {"units": units[1], "duration": [2, 3, 1]}, "file_name": "b.wav"},
             {"units": [500], "duration": [1], "file_name": "c.wav"},
             {"units": [1, 2], "duration": [1], "file_name": "d.wav"}, {"units": [10 ** 30], "file_name": "e.wav"}, [1],
             {"units": [3, 49, 7], "duration": [2, 1, 4], "file_name": "a.wav"}]
    (tmp_path / "features.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    main(Config(input=f"{tmp_path}/features.jsonl", out=f"{tmp_path}/f", durations=True, max_bad_share=0.9))
    reader = UnitReader(tmp_path / "f")
    assert said(tmp_path / "f") == {"a.wav": [3, 49, 7], "b.wav": [1, 2]}  # runs are merged
    assert reader.durations(1).tolist() == [5, 1] and reader.hours == pytest.approx(13 / 25 / 3600)
    assert reader.fingerprint == published_fingerprint(502)  # what SlamKit makes, unless told otherwise
    assert f"{tmp_path}/features.jsonl does not name its tokeniser" in (said_so := capsys.readouterr().err)
    assert "slprl/mhubert-base-25hz layer 11" in said_so and "--tokenizer" in said_so
    report = json.loads((tmp_path / "f" / "report.json").read_text())
    assert [s["id"] for s in report["skipped"]] == [f"line {i}" for i in (3, 4, 5, 6, 8)]
    assert report["already_there"] == 1  # a file named twice
    assert "not units of slprl/mhubert-base-25hz" in report["skipped"][0]["reason"]
    verify([tmp_path / "f"])
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"file_name": "a", "audio_repr": "<Un3><Un49>"}) + "\n" +
                                           json.dumps({"file_name": "b", "audio_repr": "<Un3> 49"}) + "\n")
    main(Config(input=f"{tmp_path}/tokens.jsonl", out=f"{tmp_path}/t", max_bad_share=0.5))
    assert said(tmp_path / "t") == {"a": [3, 49]}
    capsys.readouterr()
    main(Config(input=f"{tmp_path}/tokens.jsonl", out=f"{tmp_path}/e", tokenizer="embedded", max_bad_share=0.5))
    assert UnitReader(tmp_path / "e").fingerprint == SpeechTokenizer.load("embedded").fingerprint  # as it is told
    assert "does not name" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="can't be used.*no durations"):
        main(Config(input=f"{tmp_path}/tokens.jsonl", out=f"{tmp_path}/td", durations=True))
