"""Random words after the stories: one of three trainings whose average is the embedded vocoder (docs/embedded.md)."""
init = "out/vocoder/vocoder.safetensors"
units = "out/words/units"
audio = "out/words/audio"
out = "out/vocoder_words"
minutes = 6
lr = 8e-4
