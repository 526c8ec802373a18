"""slam.align_pairs: pairs of a model's own continuations."""
import json
import re

import pytest
import torch
from test_scoring import some_pairs
from test_train import tiny

from config import load_config
from dpo import prefix_pair
from slam.align_pairs import PairsConfig, choose, make_pairs
from slam.metrics import auto_bleu
from slam.speech import continue_units, load_judge
from slam.tokenizer import SpeechTokenizer
from slam.units import read_pairs, to_units


def test_choosing_among_continuations():
    def candidate(score, text="one two three four", auto_bleu=0.0):
        return {"score": score, "text": text, "auto_bleu": auto_bleu}

    cfg, a, b, c = PairsConfig(max_auto_bleu=0.1, min_gap=0.5), candidate(-3.0), candidate(-2.0), candidate(-4.0)
    assert choose([a, b, c], cfg) == (b, c)
    repeats, short, silent = candidate(-1.0, auto_bleu=0.1), candidate(-1.0, "one two"), candidate(None, "")
    assert choose([repeats, a, short, c, silent], cfg) == (a, c)  # a repetitive one may be rejected, not chosen
    assert choose([candidate(-2.4), candidate(-2.8)], cfg) is None
    assert choose([repeats, silent], cfg) is None and choose([a, silent], cfg) is None
    assert choose([repeats | {"score": -9.0}, a], cfg) == (a, repeats | {"score": -9.0})


@pytest.mark.parametrize("n", [1, 8, 30])
def test_whether_a_continuation_has_ended(n):
    """By its length alone: against the raw draws of tokens, in which nothing stops at an EOS."""
    lm = tiny().eval()
    prompts = [p.prefix for p in some_pairs(64)]
    units = continue_units(lm, [to_units(p) for p in prompts], n, 64, 3, "", temperature=2.0)
    ended = [len(u) < n for u in units]
    assert any(ended) and not all(ended)
    if n <= 8:  # beyond, rows that have ended no longer take part in the draws
        order = sorted(range(64), key=lambda i: len(prompts[i]))
        raw = lm.generate([prompts[i] for i in order], n, temperature=2.0, stop=(),
                          generator=torch.Generator().manual_seed(3))
        assert [ended[i] for i in order] == [1 in row for row in raw]
        assert [units[i] for i in order] == [to_units(row[:(row + [1]).index(1)]) for row in raw]
    never = continue_units(lm, [to_units(p) for p in prompts], n, 64, 3, "", temperature=2.0, allow_eos=False)
    assert all(len(u) == n for u in never)


def test_on_policy_pairs(stories, tmp_path, capsys):
    """Real continuations, transcripts and scores; killed, the same files result; what is chosen can be changed."""
    out = tmp_path / "align"

    def pairs(*more) -> str:
        make_pairs(load_config(PairsConfig, [*flags, *more]))
        return capsys.readouterr().out

    def refusal(*more) -> str:
        with pytest.raises(SystemExit) as e:
            pairs(*more)
        return str(e.value)

    flags = [f"--out={out}", "--checkpoint=embedded:slam-mini", f"--prompts={stories}/pairs_train.jsonl",
             "--n_prompts=4", "--n_val=1", "--n=3", "--new_units=40", "--batch=2", "--allow_eos=false", "--top_k=5",
             "--temperature=0.7", "--min_gap=0", "--max_auto_bleu=2", "--min_words=0"]
    pairs()
    lines = (out / "candidates.jsonl").read_text().splitlines(keepends=True)
    found = [json.loads(x) for x in lines[1:]]
    assert len(found) == 4 and all(len(x["candidates"]) == 3 for x in found)
    assert all(len(c["units"]) == 40 for x in found for c in x["candidates"])
    known = {p["id"]: p for p in read_pairs(stories / "pairs_train.jsonl")[1]}
    made = [read_pairs(out / f"pairs_{split}.jsonl") for split in ("train", "val")]
    assert all(f == SpeechTokenizer.load("embedded").fingerprint for f, _ in made)
    for pair in made[0][1] + made[1][1]:
        assert pair["prompt"] == known[pair["id"]]["prompt"]
        candidates = next(x["candidates"] for x in found if x["id"] == pair["id"])
        scores = [c["score"] for c in candidates if c["score"] is not None]
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(scores), min(scores))
        assert pair["chosen_ended"] is pair["rejected_ended"] is False
        tokens = prefix_pair(pair, 1024)
        assert 1 not in tokens.first + tokens.second  # the EOS that it was forbidden to draw
        assert {"units": pair["chosen"], "text": pair["chosen_text"], "score": pair["chosen_score"],
                "auto_bleu": auto_bleu(pair["chosen_text"])} in candidates
    # The score is the text LM's, of the continuation's tokens alone.
    chosen = made[0][1][0]
    model, tokenizer = load_judge("embedded:smollm2-135m")
    a, b = (tokenizer(x).input_ids for x in (chosen["prompt_text"], f" {chosen['chosen_text']}"))
    with torch.no_grad():
        logp = model(torch.tensor([a + b])).logits.float().log_softmax(-1)[0, len(a) - 1:-1]
    assert chosen["chosen_score"] == pytest.approx(logp.gather(1, torch.tensor(b)[:, None]).mean().item(), abs=1e-3)
    # Killed within the second batch.
    whole = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "pairs_train.jsonl").unlink()
    (out / "candidates.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    pairs()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
    assert "prompts gave none" in pairs("--n_val=0", "--min_gap=0.001")
    assert "a larger max_auto_bleu give more" in refusal("--min_gap=99")
    assert "temperature was 0.7, now 0.8" in refusal("--temperature=0.8")
    assert "n_val, temperature" in refusal("--n_val=-1") and "seed must not be negative" in refusal("--seed=-1")
    # Unit files as prompts, whose text the ASR has to hear.
    pairs(f"--out={tmp_path / 'units'}", f"--prompts={stories}/units/train", "--prompt_units=50",
        "--n_prompts=2", "--n_val=0")
    heard = [json.loads(x) for x in (tmp_path / "units" / "candidates.jsonl").read_text().splitlines()[1:]]
    written = (stories / "stories.jsonl").read_text().lower()
    for x in heard:
        words = re.findall("[a-z]+", x["prompt_text"].lower())
        assert len(x["prompt"]) == 50 and sum(word in written for word in words) > 0.6 * len(words) > 0
