"""figures.py: what is drawn is what is in the runs."""
import json
import re
import shutil

import pytest
from conftest import refused, run

from dev.plot import read_run

pytest.importorskip("matplotlib")


def test_pictures_of_runs(runs, tmp_path):
    for name in ("lm", "dpo"):
        shutil.copytree(runs / name, tmp_path / name)
        path = tmp_path / name / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tstorycloze": {"value": 61.0, "se": 2.0, "n": 4}}))
        slam = tmp_path / name / "checkpoint" / "slam.json"
        slam.write_text(slam.read_text().replace(str(runs), str(tmp_path)))
    lm, dpo = (read_run(tmp_path / name) for name in ("lm", "dpo"))
    slam = json.loads((tmp_path / "lm" / "checkpoint" / "slam.json").read_text())
    assert lm["flops"] == 6 * lm["n_params"] * slam["tokens"] > 0
    tuned = json.loads((tmp_path / "dpo" / "checkpoint" / "slam.json").read_text())["tokens"]
    assert dpo["flops"] == pytest.approx(lm["flops"] + 6 * lm["n_params"] * tuned) and tuned > 0
    start = shutil.copytree(tmp_path / "lm", tmp_path / "start") / "checkpoint" / "slam.json"  # a base that is scored
    start.write_text(json.dumps(json.loads(start.read_text()) | {"tokens": 0}))
    folders = [f"--run={tmp_path}/{name}" for name in ("lm", "dpo", "start")]
    said = run("dev/plot.py", *folders, f"--out={tmp_path}/plots").stdout
    assert "tstorycloze.png" in said
    svg = (tmp_path / "plots" / "tstorycloze.svg").read_text()
    assert len(re.findall(r"PathCollection_\d+", svg)) == 12  # ten published, two of ours
    assert (tmp_path / "plots" / "tstorycloze.png").stat().st_size > 10_000
    assert "no run folder" in refused("dev/plot.py", f"--run={tmp_path}/plots")
    assert "no run has nothing" in refused("dev/plot.py", f"--run={tmp_path}/lm", "--metric=nothing")
