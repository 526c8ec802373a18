"""The embedded vocoder's second training: random words after the stories of vocoder_embedded.py (docs/embedded.md)."""
init = "out/vocoder/vocoder.safetensors"
units = "out/words/units"
audio = "out/words/audio"
out = "out/vocoder_words"
minutes = 6
lr = 8e-4
