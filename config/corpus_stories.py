"""Speech to fit the embedded codebook and vocoder on: 5.3 h of stories in one voice, audio only (docs/embedded.md)."""
out = "out/corpus"
tokenizer = "none"
keep_audio = True
n_train = 750
n_val = 50
n_sblimp = 4
seed = 1000
