"""Units with durations of the corpus that the embedded vocoder is trained on (docs/embedded.md)."""
input = "out/corpus/audio"
out = "out/corpus_units"
durations = True
