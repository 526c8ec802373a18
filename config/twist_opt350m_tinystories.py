"""TWIST-350M's original recipe, with sTinyStories among its data: the paper's next row (51.21 / 54.17 / 72.40).

Budget, hours and memory as twist_opt350m.py.
"""
from config.twist_opt350m import *

out = "out/twist_opt350m_tinystories"
train = ("out/units/libri_light", "out/units/librispeech", "out/units/stinystories")
