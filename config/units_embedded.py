"""The embedded speech tokeniser (Whisper tiny.en layer 3, 500 units, 25 Hz): needs no hub and no GPU."""
tokenizer = "embedded"
