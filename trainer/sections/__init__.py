"""Every hyperparameter once: its name, type, range, default, meaning and source.

The sections are frozen; code takes just the section it works on. Leaf names are unique over
the sections and carry the names of fal-ai/personalization where it has the field, so a flat
request, a file and a flag all say `snr_gamma`. `trainer.config` joins the sections to one
configuration; how several sources become one is the business of `trainer.resolve`.

Sources of defaults and meanings: "fal" is the input schema of fal-ai/personalization, "ours"
marks what this project adds.
"""
