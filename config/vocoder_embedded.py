"""The embedded vocoder, as shipped in assets/ (docs/embedded.md)."""
units = "out/corpus_units"
audio = "out/corpus/audio"
out = "out/vocoder"
minutes = 45
