"""The evaluation of the study in miniature: validation loss and its three sets of pairs.

    python eval.py config/mini_eval.py --checkpoint=out/mini/twist_1200000_0
    python eval.py config/mini_eval.py --checkpoint=out/mini/twist_9600000_0 --generate_from=out/mini/part0/tstorycloze
"""
checkpoint = ("out/mini/twist_1200000_0",)
val = ("out/mini/part0/units/val",)
manifest = ("out/mini/part0/tstorycloze", "out/mini/part0/sstorycloze", "out/mini/part0/sblimp")
n_generate = 100
n_seeds = 3
allow_eos = False  # a cut prompt sounds finished to Whisper, so an EOS would follow at once
