"""conftest.Process: what hangs or ends too early is a failure that shows what the process said."""
import re

import pytest
from conftest import ROOT, Process, run, start


def failure(work, *args) -> str:
    return str(pytest.raises(pytest.fail.Exception, work, *args).value)


def test_waits_end():
    sleeper = start("-c", "import time; print('so far', flush=True); time.sleep(1000)")
    sleeper.until("so far")
    sleeper.limit = 0.1
    assert re.search(r"sleep\(1000\): no 'step' within 0.1 s; its output:\nso far", failure(sleeper.until, "step"))
    assert sleeper.returncode is not None and not Process.running
    sleeper = start("-c", "import time; time.sleep(1000)", limit=0.1)
    assert "still running after 0.1 s" in failure(sleeper.end) and sleeper.returncode is not None
    early = start("-c", "import sys; print('a line'); sys.exit('why')")
    said = failure(early.until, "step")
    assert "ended with code 1 before 'step'" in said and "a line" in said and "why" in said


def test_no_test_waits_by_itself():
    waits = re.compile(r"subprocess[.]Popen[(]|subprocess[.]run|check_[o]utput|[.]communicate[(]|^ *time[.]sleep", re.M)
    assert not [p.name for p in (ROOT / "tests").glob("test_*.py") if waits.search(p.read_text())]


def test_run_tells_of_bytes_and_text():
    assert run("-c", "print('a')").stdout == "a\n" and run("-c", "print('a')", text=False).stdout == b"a\n"
    assert "ValueError: b" in str(pytest.raises(AssertionError, run, "-c", "raise ValueError('b')").value)


def test_a_stage_within_this_process_is_the_stage():
    for command in (["train.py", "--stepz=1"], ["model.py", "--help"]):
        here, there = (run(*command, check=False, process=process) for process in (False, True))
        assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)
