"""slam/speech.py: what is transcribed and what the judge reads."""
import numpy as np
import pytest
import torch

from slam.embedded import resolve
from slam.speech import continuation_scores, load_judge, text_losses, transcribe


def test_text_judge():
    texts = ["The dog is sleeping near the tree.", "Dog the sleeping near is tree the."]
    good, bad = continuation_scores(["", ""], texts, "embedded:smollm2-135m")
    assert good > bad + 1


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"^{tmp_path}: can't be loaded as AutoModelForCausalLM: .*model_type"):
        load_judge(str(tmp_path))


def test_what_the_judge_reads(voice):
    """Transcripts with Whisper's leading space, as transformers' pipeline, which is SlamKit's ASR, gives them."""
    from transformers import WhisperTokenizer, pipeline
    asr, judge = "embedded:whisper-tiny.en", "embedded:smollm2-135m"
    waves = [voice("Once upon a time there was a little girl."), voice("The dog is here. It barks at me.")]
    texts = transcribe([*waves, np.zeros(0, np.float32)], asr, strip=False)
    heard = pipeline("automatic-speech-recognition", resolve(asr), device="cpu",
                     tokenizer=WhisperTokenizer.from_pretrained(resolve(asr)))
    theirs = [heard({"raw": w, "sampling_rate": 16_000}, generate_kwargs={"num_beams": 1})["text"] for w in waves]
    assert texts == [*theirs, ""] and all(t.startswith(" ") for t in theirs)
    assert transcribe(waves, asr) == [t.strip() for t in theirs]
    # The judge's tokenizer adds what it adds by itself, and the batch is padded.
    model, tokenizer = load_judge(judge)
    batch = tokenizer(theirs, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logp = model(**batch).logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.attention_mask[:, 1:]
    expected = (-(logp * mask).sum(1) / mask.sum(1)).tolist()
    found = text_losses(texts, judge)
    assert found[:2] == pytest.approx(expected, rel=1e-4) and found[2] is None
    assert text_losses([theirs[0].strip()], judge)[0] != pytest.approx(expected[0], rel=1e-3)
