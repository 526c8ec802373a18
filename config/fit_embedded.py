"""The embedded tokeniser's codebook, as shipped in assets/ (docs/embedded.md)."""
input = "out/corpus/audio"
codebook = "assets/codebook.safetensors"
encoder = "embedded:whisper-tiny.en"
layer = 3
n_units = 500
hours = 1.5
seed = 0
