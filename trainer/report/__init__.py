"""A run as a page: what it learnt, how it went and how to use it, in one file without requests.

Reads what lies in the run folder; knows nothing of how a training works.
"""
