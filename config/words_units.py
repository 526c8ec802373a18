"""Units with durations of spoken random words (dev/voices.py), to train the embedded vocoder on (docs/embedded.md)."""
input = "out/words/audio"
out = "out/words/units"
durations = True
