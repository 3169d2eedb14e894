"""Generation pipeline of one video, from its settings to its file: encode, denoise, decode."""
