"""Units with durations of a corpus' copies in other voices (dev/voices.py), to train the embedded vocoder on."""
input = "out/voices/units_audio"
out = "out/voices_units"
durations = True
