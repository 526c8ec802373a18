"""The paper's evaluation: sBLIMP, both StoryClozes, GenPPL with its ASR and judge; the downloads are where `path` says.

    python eval.py config/eval_slam.py --checkpoint out/slam,out/slam_dpo
"""
checkpoint = ("out/slam",)
val = ("out/units/librispeech_dev",)
benchmark = ("sblimp", "sstorycloze", "tstorycloze")
path = ("bench/sLM21-dataset", "bench/sSC", "bench/tSC")
generate_from = "sstorycloze"
n_generate = 1000
prompt_seconds = 3.0
new_units = 150
temperature = 0.8
top_k = 25
repetition_penalty = 1.1
asr = "openai/whisper-large-v3-turbo"
judge = "meta-llama/Llama-3.2-1B"
