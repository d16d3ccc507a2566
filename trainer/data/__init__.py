"""The data room: from whatever pictures a user has to the batches of a step.

archive → captions → pictures → crop → prepare (writes `prepared/`) → dataset.
"""
