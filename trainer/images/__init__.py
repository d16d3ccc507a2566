"""One image: decoding it, its geometry, and what can be seen in it.

pictures decodes by colours and heic · crop and rotation place windows · quality measures · faces
and masks are found by detectors and segmenters, restored and described by models. Where images
come from and what is trained of them is not known here.
"""
