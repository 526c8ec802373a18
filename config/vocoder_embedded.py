"""The embedded vocoder's first training, on stories; vocoder_words.py goes on from it (docs/embedded.md)."""
units = "out/corpus_units"
audio = "out/corpus/audio"
out = "out/vocoder"
minutes = 45
