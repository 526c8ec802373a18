"""Spoken preference pairs as in SpokenSwag, made of the text of SWAG's train.csv (not train_full.csv)."""
out = "out/spoken_swag"
tokenizer = "out/mhubert25.safetensors"
tts = "kokoro"
n_pairs = 47_900
n_val = 1_000
max_auto_bleu = 0.3
