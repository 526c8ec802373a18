"""On-policy preference pairs (AlignSLM): of Slam's own continuations, a better one chosen, a worse one rejected.

    python dpo.py pairs config/align_pairs.py
    python dpo.py config/slam_dpo.py --pairs out/align/pairs_train.jsonl --val_pairs= --out out/slam_align

The ASR and the judge are not those of the evaluation (Whisper-large-v3-turbo, Llama-3.2-1B).
"""
out = "out/align"
checkpoint = "out/slam"
prompts = "out/units/librispeech"
n_prompts = 10_000
n_val = 200
prompt_units = 60
n = 8
new_units = 100
temperature = 1.0
top_k = 50
repetition_penalty = 1.0
allow_eos = True
asr = "openai/whisper-small.en"
judge = "Qwen/Qwen2.5-1.5B"
max_auto_bleu = 0.1
min_words = 4
min_gap = 0.5
batch = 16
seed = 0
