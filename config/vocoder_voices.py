"""The embedded vocoder's second training, as shipped in assets/: units of other voices, spoken as the original.

It goes on from the first, vocoder_embedded.py's (docs/embedded.md).
"""
init = "out/vocoder/vocoder.safetensors"
units = "out/voices_units"
audio = "out/voices/clean_audio"
out = "out/vocoder_voices"
minutes = 45
