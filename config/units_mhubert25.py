"""The paper's speech tokeniser: mHuBERT base, layer 11, 25 Hz, 500 units.

    python prepare_units.py convert     # fetches the published k-means
    python prepare_units.py config/units_mhubert25.py --input train-clean-100.tar.gz --out out/units/train-clean-100

The encoder (slprl/mhubert-base-25hz, 0.4 GB) is fetched from the hub on first use.
"""
tokenizer = "out/mhubert25.safetensors"
shard_tokens = 20_000_000
