"""From whatever pictures a user has to the batches of a step.

inventory → views, masking → captioning → prepare (writes `prepared/`) → overview, to be looked at
→ plan, dataset → debug (the same again, to look at).
"""
