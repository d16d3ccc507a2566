"""The data room: from whatever pictures a user has to the batches of a step.

archive → inventory, captions → pictures → crop, masks → prepare (writes `prepared/`) → plan,
dataset → debug (the same again, to look at).
"""
