"""Changes inside other services' client packages, for programs that call them; one file each.

Knows nothing of the server but the layout of its addresses, and imports no torch.
"""
