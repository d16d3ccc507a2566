"""The server: hosted services' requests in, trainings as subprocesses, results out.

Knows run folders and the languages of services, nothing of how a training works: no torch here.
"""
