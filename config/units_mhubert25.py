"""The paper's speech tokeniser: mHuBERT base, layer 11, 25 Hz, 500 units.

    curl -O https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin
    python prepare_units.py convert --source mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin
    python prepare_units.py config/units_mhubert25.py --input train-clean-100.tar.gz --out out/units/train-clean-100

The encoder (slprl/mhubert-base-25hz, 0.4 GB) is fetched from the hub on first use.
"""
tokenizer = "out/mhubert25.safetensors"
shard_tokens = 20_000_000
