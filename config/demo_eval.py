"""The demo's benchmarks: its own held-out stories and sentences."""
checkpoint = ("out/demo/lm", "out/demo/dpo")
train = ("out/demo/data/units/train",)
val = ("out/demo/data/units/val",)
manifest = ("out/demo/data/tstorycloze", "out/demo/data/sblimp")
generate_from = "out/demo/data/tstorycloze"
n_generate = 10
allow_eos = False  # a cut prompt sounds finished to Whisper, so an EOS would follow at once
