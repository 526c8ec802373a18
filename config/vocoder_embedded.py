"""The embedded vocoder, as shipped in assets/ (README, "Assets")."""
units = "out/corpus_units"
audio = "out/corpus/audio"
out = "out/vocoder"
minutes = 45
