"""Units with durations of the corpus that the embedded vocoder is trained on (README, "Assets")."""
input = "out/corpus/audio"
out = "out/corpus_units"
durations = True
