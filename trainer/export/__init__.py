"""From trained tensors to the files that other programs read, and back.

Plain state dicts and name tables in, files out; knows neither families nor training.
"""
